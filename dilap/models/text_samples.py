"""Texts on which tokenizers are compared: each shows some wrong pre-tokenizer that the others do not show."""

from collections.abc import Sequence

SAMPLES = (
    "The quick brown fox jumps over the lazy dog. It isn't the dog's fault, they've said; WE'LL see.",
    "def area(radius: float) -> float:\n    if radius < 0:\n\t\treturn None  # no\n    return 3.14159 * radius**2\n",
    "In 2024, 1234567890 people paid $1,999.99 (or 12.5%) for 3x7=21 items at 10:45.",
    "three   spaces, \t a tab,\n\na blank line,\r\na Windows line and trailing spaces   \n\n\n  indented",
    "Élève naïf: ça coûte 5 € à Zürich, señor — “quoted” … e\u0301 combining",
    "你好，世界。日本語のテキスト、한국어 문장 ไทย",  # noqa: RUF001
    "مرحبا بالعالم، שלום עולם",
    "Привет, мир! Γειά σου Κόσμε. नमस्ते दुनिया",  # noqa: RUF001
    "emoji 😀👍🏽👩‍👩‍👧 flags 🇩🇪 and ½ ² ™ symbols ∑∞≠",
    "CamelCaseWords snake_case_words http://example.com/a?b=c&d=e#f user@example.com <tag attr='x'/>",
    "!!! ... --- ((( ]]] ''' \"\"\" ::: a/b\\c ~`@#^&*_+|",
)


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int:
    """Return the first position at which two lists of tokens differ; one may end there."""
    both = zip(expected, got, strict=False)
    return next((i for i, (one, other) in enumerate(both) if one != other), min(len(expected), len(got)))
