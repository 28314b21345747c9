"""The words of the math domain for problems of several steps, explanations, order, units, money and time.

The same rules as in phrases.py hold: no number in words, no unshown step.
"""

from moetrain.data.builtin import operands
from moetrain.data.builtin.phrases import Kind

STORIES = (
    Kind(
        operands.total_total,
        "{a} + {b} = {s}, and {s} + {d} = {c}",
        ("{a} + {b} + {d} =", "The sum of {a}, {b} and {d} is"),
        ("{a} + {b} + {d} = {s} + {d} = {c}", "First {a} + {b} = {s}, then {s} + {d} = {c}."),
        (
            (
                "{name} found {a} {things}, {other} found {b}, and the others found {d}. "
                "How many {things} were found in all?",
                "In all {c} {things} were found.",
            ),
            (
                "A cyclist rides {a} km on Friday, {b} km on Saturday and {d} km on Sunday. How many km is that?",
                "That is {c} km.",
            ),
            (
                "A shelf holds {a} novels, {b} atlases and {d} dictionaries. How many books does it hold?",
                "It holds {c} books.",
            ),
        ),
    ),
    Kind(
        operands.total_difference,
        "{a} + {b} = {s}, and {s} - {d} = {c}",
        ("{a} + {b} - {d} =",),
        ("{a} + {b} - {d} = {s} - {d} = {c}", "Add first: {a} + {b} = {s}. Then subtract: {s} - {d} = {c}."),
        (
            (
                "{name} had {a} {things}, bought {b} more and then gave {d} to {other}. "
                "How many {things} does {name} have now?",
                "{name} now has {c} {things}.",
            ),
            (
                "A bus leaves the {place} with {a} passengers. At the next stop {b} get on and {d} get off. "
                "How many passengers are on the bus then?",
                "There are {c} passengers on the bus.",
            ),
            (
                "{name} earned {a} dollars in May and {b} dollars in June, and spent {d} dollars. "
                "How many dollars are left?",
                "{c} dollars are left.",
            ),
        ),
    ),
    Kind(
        operands.difference_total,
        "{a} - {b} = {s}, and {s} + {d} = {c}",
        ("{a} - {b} + {d} =",),
        ("{a} - {b} + {d} = {s} + {d} = {c}", "Subtract first: {a} - {b} = {s}. Then add: {s} + {d} = {c}."),
        (
            (
                "There were {a} {things} in the shop. {b} were sold and {d} new ones arrived. "
                "How many {things} are in the shop now?",
                "There are {c} {things} in the shop now.",
            ),
            (
                "{name} lost {b} of {a} {things} and later found {d} others. How many {things} does {name} have?",
                "{name} has {c} {things}.",
            ),
        ),
    ),
    Kind(
        operands.product_total,
        "{a} × {b} = {s}, and {s} + {d} = {c}",
        ("{a} × {b} + {d} =", "{a} * {b} + {d} ="),
        ("{a} × {b} + {d} = {s} + {d} = {c}. Multiplication comes before addition.",),
        (
            (
                "{name} has {a} {holders} with {b} {things} each and {d} loose {things}. "
                "How many {things} does {name} have in all?",
                "{name} has {c} {things} in all.",
            ),
            (
                "A hall has {a} rows of {b} seats and {d} seats on the balcony. How many seats are there?",
                "There are {c} seats.",
            ),
            (
                "{name} saves {b} dollars a week for {a} weeks and gets {d} dollars from {other}. "
                "How many dollars does {name} have then?",
                "{name} then has {c} dollars.",
            ),
        ),
    ),
    Kind(
        operands.product_difference,
        "{a} × {b} = {s}, and {s} - {d} = {c}",
        ("{a} × {b} - {d} =", "{a} * {b} - {d} ="),
        ("{a} × {b} - {d} = {s} - {d} = {c}. Multiplication comes before subtraction.",),
        (
            (
                "{name} baked {a} trays of {b} cookies. The guests ate {d} cookies. How many cookies are left?",
                "{c} cookies are left.",
            ),
            (
                "A farmer filled {a} {holders} with {b} {things} each, but {d} {things} were bad. "
                "How many good {things} were there?",
                "There were {c} good {things}.",
            ),
        ),
    ),
    Kind(
        operands.two_products,
        "{a} × {b} = {s}, {d} × {e} = {t}, and {s} + {t} = {c}",
        ("{a} × {b} + {d} × {e} =",),
        ("{a} × {b} + {d} × {e} = {s} + {t} = {c}",),
        (
            (
                "{name} buys {a} {things} at {b} cents and {other} buys {d} {things} at {e} cents. "
                "How many cents do they spend together?",
                "They spend {c} cents.",
            ),
            (
                "A school orders {a} {holders} of {b} pencils and {d} {holders} of {e} pens. "
                "How many pencils and pens is that altogether?",
                "That is {c} altogether.",
            ),
        ),
    ),
    Kind(
        operands.total_quotient,
        "{a} + {d} = {s}, and {s} ÷ {b} = {c}",
        ("({a} + {d}) ÷ {b} =",),
        ("({a} + {d}) ÷ {b} = {s} ÷ {b} = {c}. What is in brackets comes first.",),
        (
            (
                "{name} has {a} {things} and {other} has {d}. They share all of them equally among {b} children. "
                "How many {things} does each child get?",
                "Each child gets {c} {things}.",
            ),
        ),
    ),
    Kind(
        operands.remainder,
        "{b} × {c} = {s}, and {a} - {s} = {r}",
        (),
        (
            "{a} divided by {b} is {c} with remainder {r}, since {b} × {c} = {s} and {a} - {s} = {r}.",
            "{a} = {b} × {c} + {r}",
            "{name} packs {a} {things} into {holders} of {b}. That fills {c} {holders} and leaves {r} {things} over: "
            "{c} × {b} = {s}, and {s} + {r} = {a}.",
        ),
    ),
    Kind(
        operands.average,
        "({a} + {b}) ÷ {k} = {s} ÷ {k} = {c}",
        ("The average of {a} and {b} is", "The number halfway between {a} and {b} is"),
        ("To average {a} and {b}, add them and halve the sum: {a} + {b} = {s}, and {s} ÷ {k} = {c}.",),
        (
            (
                "{name} scored {a} points in the first game and {b} in the next. What was the average score?",
                "The average score was {c} points.",
            ),
        ),
    ),
    Kind(
        operands.perimeter,
        "{a} + {b} = {s}, and {k} × {s} = {c}",
        ("The perimeter of a rectangle with sides {a} cm and {b} cm, in cm, is",),
        ("perimeter = {k} × ({a} + {b}) = {k} × {s} = {c}",),
        (
            (
                "A garden is {a} metres long and {b} metres wide. How many metres of fence go around it?",
                "{c} metres of fence go around it.",
            ),
        ),
    ),
)

LEDGERS = (
    Kind(
        operands.running,
        tells=(
            "Start with {a}. Add {b} to get {s}. Subtract {d} to get {t}. Add {e} to get {c}.",
            "Stock of {things} in the morning: {a}\nDelivered: {b}\nIn stock: {s}\nSold: {d}\nIn stock: {t}\n"
            "Delivered: {e}\nIn stock: {c}",
            "{name} opens an account with {a} dollars. After a deposit of {b} dollars it holds {s}. After a withdrawal "
            "of {d} dollars it holds {t}. After another deposit, of {e} dollars, it holds {c}.",
            "{a} + {b} = {s}\n{s} - {d} = {t}\n{t} + {e} = {c}",
        ),
    ),
    Kind(
        operands.sequence,
        tells=(
            "Count on by {d} from {t}: {t}, {u}, {v}, {w}, {x}, {c}",
            "The sequence {t}, {u}, {v}, {w}, {x} goes up by {d} each time. The next number is {x} + {d} = {c}.",
            "Question: What comes next in {t}, {u}, {v}, {w}, {x}, ... ?\nAnswer: {c}",
            "Count back by {d}: {c}, {x}, {w}, {v}, {u}, {t}",
        ),
    ),
)

EXPLANATIONS = (
    Kind(
        operands.carry,
        tells=(
            "Add {a} and {b} in columns. Ones: {p} + {q} = {r}, write {k} and carry {n}. "
            "Tens: {t} + {u} = {v}, and the carried {n} makes {w}. The sum is {c}.",
            "How do we carry in {a} + {b}? The ones give {p} + {q} = {r}. That is more than a single digit, so {k} "
            "stays in the ones column and {n} moves to the tens. The tens give {t} + {u} + {n} = {w}. "
            "Therefore {a} + {b} = {c}.",
            "  {a}\n+ {b}\n----\nOnes: {p} + {q} = {r}, write {k}, carry {n}\n"
            "Tens: {t} + {u} = {v}, {v} + {n} = {w}\nResult: {c}",
        ),
    ),
    Kind(
        operands.borrow,
        tells=(
            "Subtract {b} from {a}. In the ones column {q} is more than {p}, so borrow: {ten} + {p} = {m}, and "
            "{m} - {q} = {k}. In the tens column {t} has become {w}, and {w} - {u} = {v}. The difference is {c}.",
            "How do we borrow in {a} - {b}? We cannot take {q} from {p}, so a ten is broken up: {m} - {q} = {k}. "
            "Of the {t} tens {w} are left, and {w} - {u} = {v}. Therefore {a} - {b} = {c}.",
        ),
    ),
    Kind(
        operands.split_total,
        tells=(
            "{a} + {b}: the tens are {t} + {u} = {v}, the ones are {p} + {q} = {r}, and {v} + {r} = {c}.",
            "Split both numbers into tens and ones.\n{a} = {t} + {p}\n{b} = {u} + {q}\nTens: {t} + {u} = {v}\n"
            "Ones: {p} + {q} = {r}\nTogether: {v} + {r} = {c}",
        ),
    ),
    Kind(
        operands.split_product,
        tells=(
            "{a} × {b} = {a} × {t} + {a} × {p} = {v} + {r} = {c}",
            "To multiply {a} by {b}, split {b} into {t} and {p}. {a} times {t} is {v}, and {a} times {p} is {r}. "
            "Add the parts: {v} + {r} = {c}.",
            "{a} × ({t} + {p}) = {v} + {r} = {c}",
        ),
    ),
    Kind(
        operands.through_ten,
        tells=(
            "{a} + {b} = {a} + {d} + {e} = {ten} + {e} = {c}",
            "To add {b} to {a}, first fill up to {ten}: {a} + {d} = {ten}. From {b} there are {e} left, "
            "and {ten} + {e} = {c}.",
        ),
    ),
    Kind(
        operands.digits,
        tells=(
            "{a} = {h} + {t} + {p}",
            "In {a} the digit {i} stands for {h}, the digit {j} for {t} and the digit {p} for {p} ones.",
            "The number {a}: hundreds {i}, tens {j}, ones {p}.",
        ),
    ),
    Kind(
        operands.rounding,
        tells=(
            "{a} lies between {t} and {u}. Rounded to tens it is {c}.",
            "Round {a} to tens: the last digit is {p}, so the result is {c}.",
        ),
    ),
)

ORDER = (
    Kind(
        operands.pair,
        asks=("Which is larger, {a} or {b}?", "The larger of {a} and {b} is", "max({a}, {b}) ="),
        tells=(
            "{c} > {d}",
            "{d} < {c}",
            "{c} is greater than {d}.",
            "{d} comes before {c} when we count.",
            "{name} has {a} {things} and {other} has {b}. The larger number is {c}.",
            "The smaller of {a} and {b} is {d}.",
        ),
    ),
    Kind(
        operands.triplet,
        asks=("The largest of {a}, {b} and {e} is", "max({a}, {b}, {e}) ="),
        tells=(
            "{d} < {m} < {c}",
            "From smallest to largest: {d}, {m}, {c}",
            "Put {a}, {b} and {e} in order: {d}, {m}, {c}",
            "min({a}, {b}, {e}) = {d}",
        ),
    ),
)

MONEY_AND_TIME = (
    Kind(
        operands.money,
        tells=(
            "${ad}.{ac:02} + ${bd}.{bc:02} = ${cd}.{cc:02}",
            "{name} buys a pen for ${ad}.{ac:02} and a card for ${bd}.{bc:02}. Together they cost ${cd}.{cc:02}.",
            "Receipt\n{things}: ${ad}.{ac:02}\n{holders}: ${bd}.{bc:02}\nTotal: ${cd}.{cc:02}",
            "Q: {name} has ${ad}.{ac:02} and gets ${bd}.{bc:02} more. How much money is that?\nA: ${cd}.{cc:02}",
        ),
    ),
    Kind(
        operands.change,
        tells=(
            "${ad}.{ac:02} - ${bd}.{bc:02} = ${cd}.{cc:02}",
            "{name} pays for {things} that cost ${bd}.{bc:02} with ${ad}.{ac:02}. The change is ${cd}.{cc:02}.",
            "Q: The price is ${bd}.{bc:02} and {name} pays with ${ad}.{ac:02}. How much change is due?\n"
            "A: ${cd}.{cc:02}",
            "Price: {b} cents\nPaid: {a} cents\nChange: {c} cents",
        ),
    ),
    Kind(
        operands.same_hour,
        tells=(
            "A lesson starts at {h}:{a:02} and lasts {b} minutes. It ends at {h}:{c:02}.",
            "Q: It is {h}:{a:02}. What time will it be in {b} minutes?\nA: {h}:{c:02}",
            "The bus left the {place} at {h}:{a:02} and arrived at {h}:{c:02}. The ride took {b} minutes.",
        ),
    ),
    Kind(
        operands.next_hour,
        tells=(
            "A film starts at {h}:{a:02} and lasts {b} minutes. {a} + {b} = {s} minutes, which is {n} hour and {c} "
            "minutes, so it ends at {i}:{c:02}.",
            "Q: It is {h}:{a:02}. What time will it be in {b} minutes?\nA: {i}:{c:02}",
        ),
    ),
    Kind(
        operands.hours_minutes,
        tells=(
            "{a} hours and {b} minutes are {c} minutes, since {a} × {hour} = {s} and {s} + {b} = {c}.",
            "{c} minutes = {a} h {b} min",
        ),
    ),
)


def _unit(factor: int, many: str, few: str) -> Kind:
    return Kind(
        operands.times(factor),
        asks=(f"Question: How many {few} are in {{a}} {many}?\nAnswer:", f"{{a}} {many} in {few}:"),
        tells=(
            f"{{a}} {many} = {{c}} {few}",
            f"{{c}} {few} make {{a}} {many}.",
            f"To turn {{a}} {many} into {few}, multiply by {{k}}: {{a}} × {{k}} = {{c}}.",
        ),
    )


UNITS = (
    _unit(7, "weeks", "days"),
    _unit(12, "dozen", "pieces"),
    _unit(12, "years", "months"),
    _unit(24, "days", "hours"),
    _unit(60, "hours", "minutes"),
    _unit(60, "minutes", "seconds"),
    _unit(10, "cm", "mm"),
    _unit(100, "metres", "cm"),
    _unit(1000, "km", "metres"),
    Kind(
        operands.times(2),
        asks=("Twice {a} is", "Double {a}:", "The double of {a} is"),
        tells=("Half of {c} is {a}.", "{a} + {a} = {c}", "{k} × {a} = {c}, so half of {c} is {a}."),
    ),
    Kind(
        operands.times(4),
        asks=("The perimeter of a square with side {a} cm, in cm, is",),
        tells=("A quarter of {c} is {a}.", "A square with side {a} has perimeter {k} × {a} = {c}."),
    ),
)
