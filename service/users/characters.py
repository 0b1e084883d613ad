"""Characters by which two e-mails could look the same: invisible ones, and letters that look like others."""

import re
import unicodedata

import idna

# By general category (https://www.unicode.org/reports/tr44/#General_Category_Values).
_KINDS = {
    "Cc": "control",
    "Cf": "invisible",
    "Cn": "unassigned",
    "Co": "private-use",
    "Cs": "surrogate",
    "Zl": "invisible",
    "Zp": "invisible",
    "Zs": "invisible",
}
# Letters, marks and symbols without ink: the Default_Ignorable_Code_Point of these categories
# (https://www.unicode.org/Public/UCD/latest/ucd/DerivedCoreProperties.txt), and two blank symbols.
_BLANK = frozenset(
    [
        *map(chr, (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, 0x1D159)),
        *map(chr, (0x180B, 0x180C, 0x180D, 0x180F)),
        *map(chr, range(0xFE00, 0xFE10)),
        *map(chr, range(0xE0100, 0xE01F0)),
    ]
)
# Scripts with letters that look like those of another, by the first words of the names of their letters.
_ALIKE = frozenset(["LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "CHEROKEE", "COPTIC", "LISU"])
_WORD = re.compile(r"[^\W\d_]+")
# Between letters of some scripts these change what a reader sees.
_JOINERS = frozenset("\u200c\u200d")


def invisible_error(text: str) -> str | None:
    """Check that a text has no control, invisible, private-use or unassigned characters.

    Joiners are allowed where their script needs them (https://www.rfc-editor.org/rfc/rfc5892#appendix-A.1).
    """
    # To Python, exactly the characters of `_KINDS` are not printable; and a space is.
    if text.isprintable() and _BLANK.isdisjoint(text):
        return None
    for position, character in enumerate(text):
        kind = _kind(character)
        if kind and not (character in _JOINERS and _joins(text, position)):
            return f"must not contain the {kind} character U+{ord(character):04X}"
    return None


def mixed_scripts_error(text: str) -> str | None:
    """Check that no word of a text has letters of two scripts that look alike, such as Latin and Cyrillic.

    Whole words of different scripts are usual. See https://www.unicode.org/reports/tr39/#Mixed_Script_Detection.
    """
    if text.isascii():
        return None
    for word in _WORD.findall(text):
        scripts = _ALIKE.intersection(unicodedata.name(letter, "").partition(" ")[0] for letter in word)
        if len(scripts) > 1:
            first, second, *_ = sorted(script.title() for script in scripts)
            return f"must not have {first} and {second} letters in one word"
    return None


def _kind(character: str) -> str | None:
    if character in _BLANK:
        return "invisible"
    return _KINDS.get(unicodedata.category(character))


def _joins(text: str, position: int) -> bool:
    try:
        return idna.valid_contextj(text, position)
    except ValueError:  # a neighbour is unassigned
        return False
