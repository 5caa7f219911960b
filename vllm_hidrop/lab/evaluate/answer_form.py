"""The official answer normalisation of VQA scoring: case, punctuation, numbers, articles, apostrophes.

**Source**: ``EvalAIAnswerProcessor`` of MMF, after the VQA challenge's ``vqaEval.py``.
**Differs**: its table of contractions is written by rule (a word without one of its apostrophes gets it back);
entries with capital letters are left out, as words are in lower case when it is looked up.
"""

import re

NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS.split())} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_->' + "<@`,?!"
COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
FULL_STOP = re.compile(r"\.(?!\d)")

CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


CONTRACTIONS = {short: word for word in CONTRACTED.split() for short in _without_one_apostrophe(word)}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table has this one the wrong way round


def normalised(text: str) -> str:
    """The form in which two answers are compared."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark beside a space goes, one between letters becomes a space; a full stop stays before a digit only."""
    result = text
    for mark in PUNCTUATION:
        is_dropped = f"{mark} " in text or f" {mark}" in text or COMMA_IN_NUMBER.search(text)
        result = result.replace(mark, "" if is_dropped else " ")
    return FULL_STOP.sub("", result)
