"""The words of the math domain: for each kind of problem its pattern of numbers and the ways to say it.

No number is ever written in these words ("both", never its count), and no pronoun stands for a person: whatever number
a reader finds in a text is one of the pattern's. `{a}`, `{b}` and so on are the pattern's numbers, `{c}` the answer.
"""

from dataclasses import dataclass

from moetrain.data.builtin import operands
from moetrain.data.builtin.draws import listed
from moetrain.data.builtin.facts import Family
from moetrain.data.builtin.operands import Pattern

NAMES = listed(
    "Ada Ben Clara Dan Elif Farid Grace Hugo Ines Jonas Kofi Lena Mia Noor Omar Priya Quinn Rosa Sam Tara Uma Victor "
    "Wen Ximena Yusuf Zoe Anton Bella Carlos Dina Emil Fiona Goran Hana Ivan Julia Kenji Lucia Marta Nils"
)
THINGS = listed(
    "apples pears plums oranges lemons cherries nuts eggs cookies muffins candles pencils erasers notebooks stickers "
    "stamps coins marbles buttons beads shells stones leaves flowers seeds cards tickets photos books magazines bricks "
    "tiles nails screws bottles cups plates spoons socks ribbons balloons kites toys blocks badges postcards"
)
HOLDERS = listed("boxes bags baskets crates jars trays drawers shelves packets tins sacks folders cartons cases")
PLACES = listed("park school library market station museum bakery harbour bridge lake farm cinema")


@dataclass(frozen=True)
class Kind:
    """One kind of problem. `family` is set where it rests on a single fact, so that it can be held out and probed."""

    pattern: Pattern
    work: str = ""  # the worked steps as equations
    asks: tuple[str, ...] = ()  # what the answer follows after a space
    tells: tuple[str, ...] = ()  # whole texts
    stories: tuple[tuple[str, str], ...] = ()  # a question in words, and its answer as a sentence
    family: Family | None = None


# Around a story: {q} its question, {r} its reply, {w} the worked steps. After the first group the bare answer follows.
ASKING = (
    "Question: {q}\nAnswer:",
    "Q: {q}\nA:",
    "{q} The answer is",
    "{q}\nAnswer:",
    "Problem: {q}\nResult:",
    "Exercise. {q}\nSolution:",
)
TELLING = (
    "{q} {r}",
    "{q}\n{r}",
    "Question: {q}\nAnswer: {r}",
    "Q: {q}\nA: {r}",
    "Problem: {q}\nSolution: {w}. {r}",
    "{q}\nWork: {w}\nAnswer: {{c}}",
    "{q} To find out, we compute {w}. {r}",
    "Exercise. {q}\nSteps: {w}.\n{r}",
    "{q}\nLet us work it out: {w}. So the answer is {{c}}.",
)

TOTAL = Kind(
    operands.total,
    "{a} + {b} = {c}",
    (
        "{a} + {b} =",
        "{a}+{b} =",
        "{a} plus {b} is",
        "{a} plus {b} equals",
        "The sum of {a} and {b} is",
        "Add {a} and {b}:",
        "{a} and {b} make",
        "{a} added to {b} gives",
        "{b} more than {a} is",
        "{a} increased by {b} is",
        "What is {a} + {b}? Answer:",
        "Question: What is {a} + {b}?\nAnswer:",
        "Q: How much is {a} plus {b}?\nA:",
        "Compute {a} + {b}.\nResult:",
        "Find the sum: {a} + {b} =",
        "If x = {a} + {b}, then x =",
        "Starting at {a} and counting up {b} brings us to",
        "x - {a} = {b}, so x =",
        "sum({a}, {b}) =",
    ),
    (
        "{c} = {a} + {b}",
        "{c} is the sum of {a} and {b}.",
        "We can split {c} into {a} and {b}.",
        "{a} + {b} = {b} + {a} = {c}. The order of the addends does not matter.",
        "Because {a} + {b} = {c}, we also know that {c} - {b} = {a} and {c} - {a} = {b}.",
        "Fill in the blank: {a} + __ = {c}\nThe missing number is {b}.",
        "Fill in the blank: __ + {b} = {c}\nThe missing number is {a}.",
        "What must be added to {a} to get {c}? {b}",
        "Check the sum {a} + {b} = {c} by subtracting: {c} - {b} = {a}, as it should be.",
        "Solve x + {a} = {c}. Subtract {a} from both sides: x = {c} - {a} = {b}.",
        "Solve x - {b} = {a}. Add {b} to both sides: x = {a} + {b} = {c}.",
        ">>> {a} + {b}\n{c}",
    ),
    (
        (
            "{name} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?",
            "Together they have {c} {things}.",
        ),
        (
            "{name} had {a} {things} and then bought {b} more. How many {things} does {name} have now?",
            "{name} now has {c} {things}.",
        ),
        (
            "There are {a} {things} on the table and {b} {things} on the floor. How many {things} are there in all?",
            "There are {c} {things} in all.",
        ),
        (
            "A shop sold {a} {things} in the morning and {b} in the afternoon. What was the total for the day?",
            "The shop sold {c} {things} that day.",
        ),
        (
            "A train has {a} passengers. At the {place} {b} more get on and nobody gets off. "
            "How many passengers are on the train now?",
            "There are now {c} passengers on the train.",
        ),
        (
            "{name} read {a} pages on Monday and {b} pages on Tuesday. How many pages is that altogether?",
            "Altogether {name} read {c} pages.",
        ),
        (
            "{name} walked {a} metres to the {place} and then {b} metres further. How far did {name} walk?",
            "{name} walked {c} metres.",
        ),
        (
            "After giving away {a} {things}, {name} still has {b}. How many {things} did {name} have at first?",
            "At first {name} had {c} {things}.",
        ),
        (
            "A rope of {a} cm is joined end to end with a rope of {b} cm. How long is the joined rope in cm?",
            "The joined rope is {c} cm long.",
        ),
        (
            "The red team scored {a} points and the blue team scored {b}. How many points were scored altogether?",
            "The teams scored {c} points.",
        ),
        (
            "{other} collected {a} {things}. {name} collected {b} {things} more than {other}. "
            "How many {things} did {name} collect?",
            "{name} collected {c} {things}.",
        ),
        (
            "A parcel of {a} g lies on the scales and {name} adds a parcel of {b} g. What do the scales show, in g?",
            "The scales show {c} g.",
        ),
        (
            "{name} pays {a} dollars for {things} and {b} dollars for a coat. How many dollars does {name} pay?",
            "{name} pays {c} dollars.",
        ),
    ),
    "additive",
)

DIFFERENCE = Kind(
    operands.difference,
    "{a} - {b} = {c}",
    (
        "{a} - {b} =",
        "{a}-{b} =",
        "{a} minus {b} is",
        "{a} minus {b} equals",
        "The difference between {a} and {b} is",
        "Take {b} from {a}:",
        "{a} take away {b} leaves",
        "Subtract {b} from {a}:",
        "{b} less than {a} is",
        "{a} decreased by {b} is",
        "What is {a} - {b}? Answer:",
        "Question: What is {a} - {b}?\nAnswer:",
        "Q: How much is {a} minus {b}?\nA:",
        "Question: How much larger is {a} than {b}?\nAnswer:",
        "Find the difference: {a} - {b} =",
        "If x + {b} = {a}, then x =",
        "Counting down {b} from {a} brings us to",
        "To get from {b} up to {a} we must add",
    ),
    (
        "{c} = {a} - {b}",
        "{a} is {c} more than {b}.",
        "{b} is {c} less than {a}.",
        "{a} - {b} = {c}, because {b} + {c} = {a}.",
        "Fill in the blank: {a} - __ = {c}\nThe missing number is {b}.",
        "Fill in the blank: __ - {b} = {c}\nThe missing number is {a}.",
        "What must be taken from {a} to leave {c}? {b}",
        "Take {b} away from {a} and {c} is left; put it back and we have {c} + {b} = {a} again.",
        "On the number line {a} and {b} are {c} apart.",
        ">>> {a} - {b}\n{c}",
    ),
    (
        (
            "{name} had {a} {things} and gave {b} of them to {other}. How many {things} are left?",
            "{name} has {c} {things} left.",
        ),
        (
            "There were {a} {things} in the box. {name} took out {b}. How many {things} remain in the box?",
            "{c} {things} remain in the box.",
        ),
        (
            "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have than {other}?",
            "{name} has {c} more {things} than {other}.",
        ),
        (
            "A book has {a} pages. {name} has read {b} of them. How many pages are left to read?",
            "{c} pages are left to read.",
        ),
        (
            "A ribbon is {a} cm long. {name} cuts off {b} cm. How many cm of ribbon are left?",
            "{c} cm of ribbon are left.",
        ),
        (
            "The way to the {place} is {a} metres. {name} has walked {b} metres. How many metres are still to go?",
            "There are {c} metres still to go.",
        ),
        (
            "A baker made {a} loaves and sold {b}. How many loaves were not sold?",
            "{c} loaves were not sold.",
        ),
        (
            "Of the {a} children at the {place}, {b} went home. How many children stayed?",
            "{c} children stayed.",
        ),
        (
            "{name} and {other} have {a} {things} together. {other} has {b} of them. "
            "How many {things} belong to {name}?",
            "{c} {things} belong to {name}.",
        ),
        (
            "A tank held {a} litres and {b} litres leaked out. How many litres are in the tank now?",
            "The tank now holds {c} litres.",
        ),
        (
            "{name} needs {a} points to win and has {b} so far. How many more points does {name} need?",
            "{name} needs {c} more points.",
        ),
        (
            "{name} had {a} dollars and spent {b} dollars on {things}. How many dollars does {name} have left?",
            "{name} has {c} dollars left.",
        ),
    ),
    "additive",
)

PRODUCT = Kind(
    operands.product,
    "{a} × {b} = {c}",
    (
        "{a} × {b} =",
        "{a} * {b} =",
        "{a} x {b} =",
        "{a}*{b} =",
        "{a} times {b} is",
        "{a} times {b} equals",
        "The product of {a} and {b} is",
        "Multiply {a} by {b}:",
        "{a} multiplied by {b} gives",
        "What is {a} × {b}? Answer:",
        "Question: What is {a} times {b}?\nAnswer:",
        "Q: How much is {a} × {b}?\nA:",
        "Find the product: {a} × {b} =",
        "If x ÷ {a} = {b}, then x =",
        "The area of a rectangle with sides {a} and {b} is",
        "{a} by {b} makes",
    ),
    (
        "{c} = {a} × {b}",
        "{a} × {b} = {b} × {a} = {c}. The order of the factors does not matter.",
        "{c} is the product of {a} and {b}.",
        "Fill in the blank: {a} × __ = {c}\nThe missing factor is {b}.",
        "A rectangle is {a} cm wide and {b} cm long. Its area is {a} × {b} = {c} square cm.",
        ">>> {a} * {b}\n{c}",
    ),
    (
        (
            "There are {a} {holders} with {b} {things} each. How many {things} are there in all?",
            "There are {c} {things} in all.",
        ),
        (
            "{name} buys {a} {holders} of {things}. Each holds {b}. How many {things} does {name} buy?",
            "{name} buys {c} {things}.",
        ),
        (
            "The {things} are laid out in {a} rows of {b}. How many {things} are there?",
            "There are {c} {things}.",
        ),
        (
            "{name} reads {b} pages every day for {a} days. How many pages does {name} read?",
            "{name} reads {c} pages.",
        ),
        (
            "A ticket to the {place} costs {b} dollars. How many dollars do {a} tickets cost?",
            "{a} tickets cost {c} dollars.",
        ),
        (
            "A machine makes {b} {things} an hour. How many {things} does it make in {a} hours?",
            "It makes {c} {things}.",
        ),
        (
            "Each of {a} children brings {b} {things} to the {place}. How many {things} do they bring?",
            "They bring {c} {things}.",
        ),
        (
            "{name} walks {b} metres to the {place}, and does so {a} times. How many metres is that?",
            "That is {c} metres.",
        ),
        (
            "{other} has {b} {things}. {name} has {a} times as many. How many {things} does {name} have?",
            "{name} has {c} {things}.",
        ),
    ),
    "multiplicative",
)

QUOTIENT = Kind(
    operands.quotient,
    "{a} ÷ {b} = {c}",
    (
        "{a} ÷ {b} =",
        "{a} / {b} =",
        "{a} divided by {b} is",
        "{a} divided by {b} equals",
        "Divide {a} by {b}:",
        "{a} shared equally among {b} gives",
        "What is {a} ÷ {b}? Answer:",
        "Question: What is {a} divided by {b}?\nAnswer:",
        "Q: How many times does {b} go into {a}?\nA:",
        "The quotient of {a} and {b} is",
        "If {b} × x = {a}, then x =",
    ),
    (
        "{c} = {a} ÷ {b}",
        "{a} ÷ {b} = {c}, because {b} × {c} = {a}.",
        "{b} goes into {a} exactly {c} times.",
        "{a} is a multiple of {b}: {a} = {b} × {c}.",
        "Solve {b} × x = {a}. Divide both sides by {b}: x = {a} ÷ {b} = {c}.",
        ">>> {a} // {b}\n{c}",
    ),
    (
        (
            "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
            "Each friend gets {c} {things}.",
        ),
        (
            "{a} {things} are packed into {b} {holders}, the same number in each. How many {things} go into each?",
            "{c} {things} go into each.",
        ),
        (
            "A box holds {b} {things}. How many such boxes does {name} need for {a} {things}?",
            "{name} needs {c} boxes.",
        ),
        (
            "{b} tickets to the {place} cost {a} dollars. How many dollars does each ticket cost?",
            "Each ticket costs {c} dollars.",
        ),
        (
            "{name} plants {a} seeds in {b} equal rows. How many seeds are in each row?",
            "There are {c} seeds in each row.",
        ),
        (
            "A string of {a} cm is cut into pieces of {b} cm. How many pieces are there?",
            "There are {c} pieces.",
        ),
        (
            "In {b} days {name} read {a} pages, equally many each day. How many pages is that per day?",
            "That is {c} pages per day.",
        ),
    ),
    "multiplicative",
)

SINGLE = (TOTAL, DIFFERENCE, PRODUCT, QUOTIENT)
