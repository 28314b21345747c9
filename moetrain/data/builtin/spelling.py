"""Numbers in words."""

ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = (
    *("ten", "eleven", "twelve", "thirteen", "fourteen"),
    *("fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def _spelled() -> tuple[str, ...]:
    below_100 = (*ONES, *TEENS, *(ten + (f"-{one}" if digit else "") for ten in TENS for digit, one in enumerate(ONES)))
    above = (f"{one} hundred" + (f" {rest}" if low else "") for one in ONES[1:] for low, rest in enumerate(below_100))
    return (*below_100, *above)


SPELLED = _spelled()  # 0 to 999, by number
