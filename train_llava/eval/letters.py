"""The option that an answer to a multiple-choice question names, read without an LLM.

Models put the letter into many forms: bold, boxed, in brackets, in a sentence of English or Chinese, before an
explanation. It is read where it is clear that it is the answer; what names two options, or may mean none, is unread.
"""

from __future__ import annotations

import re
import unicodedata

_MARKUP = re.compile(r"<[|/]?\w+[|/]?>|\\(?:text|math)[a-z]*|\\[()\[\]]")
_EMPHASIS = re.compile(r"(\*{1,3}|_{2,3}|`{1,3}|\${1,2})(?=\S)(.{1,200}?)(?<=\S)\1")
_EDGE = " \t\n.,:;!?。、…\"'“”‘’()[]{}*_`"

_OPEN = r"[\s(\[{\"'“‘「『【《*_#>•-]*"
_CLOSE = r"(?:[\s)\]}\"'”’」』】》_.,:;!?。、…]|\*\*)*"
_LETTER = r"(?P<letter>[A-Z])(?![A-Z0-9])"

_NOUN = r"(?:option|choice|answer)"
_PHRASE = rf"""
    (?:the\s+|my\s+)? (?:(?:final|correct|right|best)\s+)* {_NOUN}
    (?:\s+(?:to|for)\s+(?:the|this)\s+(?:\w+\s+)?question)?"""
_VERB = rf"""
    \s* (?:\b(?:is|would\s+be|should\s+be|must\s+be)(?:\s+\w+ly)?\b | [:=])+ (?:\s*(?:the\s+)?{_NOUN}\b)?"""
_SAYS = re.compile(
    rf"""(?: (?<!\w){_PHRASE}{_VERB}
           | \bI(?:\s+would|\s+will|['’]d|['’]ll)?\s+(?:choose|select|pick|go\s+with)\s+(?:the\s+)?{_NOUN}?
           | (?P<chinese> (?: (?:答案|正确的?选项)(?:应该|应|就)?(?:是|为|选|[:=])+ | 选择?(?:的?是)? )
                          \s*(?:选项|答案)?\s*:? )
         ) {_OPEN}{_LETTER}""",
    re.IGNORECASE | re.VERBOSE,
)
"""A sentence that calls the letter the answer; it may stand at the end of a longer text."""
_STARTS = re.compile(
    rf"""(?: (?:assistant|response|output)\s*: )? {_OPEN}
         (?P<lead> (?:(?:so|thus|hence|therefore)\b,?\s+)? (?:I\s+(?:think|believe|guess)\s+(?:that\s+)?)?
                   (?: (?:it\s+is|it['’]s)\b | {_PHRASE}(?:{_VERB})?
                     | (?:正确)?(?:答案|选项)[】\]]?(?:[是为:])? )?
         ) {_OPEN}""",
    re.IGNORECASE | re.VERBOSE,
)
"""What may stand before the answer at the start of a text; `lead` is what may stand before an option's own text too."""
_ENDS = re.compile(
    r"""(?: [ \t]*(?:$|\n) | \s*(?P<mark>[)\]}:]) | \s*(?P<stop>\.)(?![A-Z]\b) | \s*[,;!?。、…」』】》]
          | \s*["'”’](?!\w) | \s+[-–—]+\s | \s+(?:because|since)\b
          | \s+is\s+(?:the\s+)?(?:correct|right|best)(?:\s+(?:answer|option|choice|one))?\s*(?:[.,;!?。]|$)
          | \s+is\s+the\s+answer\b
          | \s*(?:选项|项)(?![^,。]{0,4}[不错非]) | \s*(?:选项|项)?(?:是|为)?(?:正确|对的|答案) )""",
    re.IGNORECASE | re.VERBOSE,
)
"""What stands behind a letter that is an answer, and not an article or an initial."""
_CHINESE_GOES_ON = re.compile(r"(?=[\u4e00-\u9fff])(?![或和与及跟还不错]|是[不错])")
_AND = re.compile(
    rf"""{_CLOSE} (?:[,/&、?]|\band\b|\bor\b|[或和与及]|还是) \s* (?:and\s+|or\s+)? (?:option\s+)?
         {_OPEN} (?:A(?!\s+\w)|[B-H])(?![\w'’])""",
    re.IGNORECASE | re.VERBOSE,
)
"""A second letter beside the first."""
_NO = re.compile(
    r"\b(?:not|never|neither|nor|no|cannot|doubt|if|unless|whether)\b|n['’]t\b|[不非没别]|如果", re.IGNORECASE
)


def letter(text: str, options: dict[str, str]) -> str | None:
    """The option that an answer names: by its letter ("B", "(b)", "**B.** a dog", "The answer is B.", "选B") or by its
    whole text.

    None where it names none, or two. "A dog" is no letter: it starts with an article. The official MMStar and MMBench
    evaluations would count it as A, or ask an LLM.
    """
    plain = _plain(text)
    alone = re.fullmatch(f"{_OPEN}{_LETTER}{_CLOSE}", plain, re.IGNORECASE)
    if alone and alone["letter"].upper() in options:
        return alone["letter"].upper()
    whole = _by_text(text, options)
    if whole:
        return whole
    start = _STARTS.match(plain)
    first = re.compile(_LETTER, re.IGNORECASE).match(plain, start.end())
    named = {_named(plain, said, options, phrase=True) for said in _SAYS.finditer(plain)}
    if first:
        name, rest = first["letter"].upper(), plain[first.end() :]
        if name in options and _by_text(rest, {name: options[name]}):
            return name
        if not _enumerated(rest, name, options):
            named.add(_named(plain, first, options, phrase=bool(start["lead"])))
    named.discard(None)
    if named:
        return named.pop() if len(named) == 1 else None
    return _by_text(plain[start.end() :], options) if start["lead"] else None


def _plain(text: str) -> str:
    """Full-width characters as ASCII; without Markdown, LaTeX and tags."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\\boxed\s*|<answer>", " answer: ", text)
    return _EMPHASIS.sub(r"\2", _EMPHASIS.sub(r"\2", _MARKUP.sub("", text))).strip()


def _by_text(text: str, options: dict[str, str]) -> str | None:
    """The one option whose text this is: but for case and a full stop, or else but for all marks around it."""
    for form in (lambda text: text.strip().rstrip(".").lower(), lambda text: _plain(text).strip(_EDGE).casefold()):
        said = form(text)
        same = [name for name, option in options.items() if said and form(option) == said]
        if same:
            return same[0] if len(same) == 1 else None
    return None


def _named(plain: str, match: re.Match, options: dict[str, str], *, phrase: bool) -> str | None:
    """The option whose letter is matched, unless what stands around it takes it back or names another one.

    phrase: whether a sentence led to the letter, which may go on behind it ("The answer is (B) or maybe C").
    """
    name, rest = match["letter"].upper(), plain[match.end() :]
    clause = re.split(r"[.,;:!?\n。]", plain[: match.start()])[-1]
    if name not in options or _NO.search(clause) or _AND.match(rest):
        return None
    ends = _ENDS.match(rest)
    if ends and (ends["stop"] or (ends["mark"] and not phrase)):
        return name
    if match["letter"].isupper() and _own_text_follows(rest, options[name]):
        return name
    if not ends and not (match.groupdict().get("chinese") and _CHINESE_GOES_ON.match(rest)):
        return None
    others = "".join(other for other in options if other != name)
    before, after = (re.split(r"[.!?\n。]", part) for part in (plain[: match.start("letter")], rest))
    again = rf"(?<![A-Za-z0-9'’])(?!A\s+[a-z])[{others}](?![A-Za-z0-9'’])"
    return None if others and re.search(again, f"{before[-1]} . {after[0]}") else name


def _own_text_follows(rest: str, option: str) -> bool:
    own = re.escape(_plain(option).strip(_EDGE))
    ends = rf"[\W_]*{own}[\"'”’)\]}}*]*\s*(?:[.!?。]|$)"
    return bool(own and re.match(ends, rest, re.IGNORECASE | re.MULTILINE))


def _enumerated(rest: str, name: str, options: dict[str, str]) -> bool:
    """Whether other options are listed behind the first letter: then it need not be the answer."""
    for other, option in options.items():
        own = re.escape(_plain(option).strip(_EDGE))
        listed = rf"(?m)^[^\w\n]*{other}(?:[.):]|\s*$)" + (rf"|\b{other}[.):]+\s*{own}" if own else "")
        if other != name and re.search(listed, rest):
            return True
    return False
