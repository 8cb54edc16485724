"""Which language a text is in, as far as its writing tells.

A guess by script, not by vocabulary: what is written in Latin letters is "Latin", whether it is
English or Vietnamese. Words are counted for each script, a word being a run of its letters; of
Chinese and Japanese, which are written without blanks, each character counts as one. Where there
is any kana, Chinese characters are Japanese. The script with the most words is the text's.
"""

import re

NO_LETTERS = "none"
OTHER = "other"

_WORDS = {
    "Latin": re.compile(
        r"[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]+"
    ),
    "Chinese": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"),
    "Japanese": re.compile(r"[\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff\uff66-\uff9d]"),
    "Korean": re.compile(r"[\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]+"),
    "Cyrillic": re.compile(r"[\u0400-\u052f]+"),
    "Greek": re.compile(r"[\u0370-\u03ff\u1f00-\u1fff]+"),
    "Arabic": re.compile(r"[\u0620-\u064a\u066e-\u06d3\u0750-\u077f\ufb50-\ufdff\ufe70-\ufefc]+"),
    "Hebrew": re.compile(r"[\u05d0-\u05ea]+"),
    "Devanagari": re.compile(r"[\u0900-\u0963\u0970-\u097f]+"),
    "Thai": re.compile(r"[\u0e01-\u0e4e]+"),
}
# Written by the format, whatever language is spoken.
_FORMAT = re.compile(r"</?(?:ref|box|quad)>|\bPicture \d+:")


def script_of(text: str) -> str:
    """The script that most of a text is written in.

    Returns:
        A name such as "Latin" or "Chinese"; `OTHER` where no letter is of a script that is
        known here, `NO_LETTERS` where there is none.
    """
    spoken = _FORMAT.sub(" ", text)
    counts = {script: len(words.findall(spoken)) for script, words in _WORDS.items()}
    if counts["Japanese"]:
        counts["Japanese"] += counts.pop("Chinese")
    script = max(counts, key=counts.__getitem__)
    if counts[script]:
        return script
    return OTHER if any(character.isalpha() for character in spoken) else NO_LETTERS
