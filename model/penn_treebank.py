r"""Words of a line after the rules of the Penn Treebank, as the reference of the caption metrics splits them.

The reference (pycocoevalcap) runs Stanford's tokenizer, in Java, and drops punctuation. These are rules of our own
that give the same words. At each place the longest rule wins, of two equally long ones the first; what a rule asks to
follow the token counts as length. Brackets stay, as -lrb- and the like. Lower case comes last, since a capital tells
whether an abbreviation ends a sentence.

Known to differ: an acronym at the very end of a line, where the reference looks on into the next caption.
"""

from collections.abc import Callable
from functools import cache

import regex

PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""Tokens that are no words. (The reference lists the round and curly brackets too, in capitals that never occur.)"""

PLAIN = regex.compile(r"[A-Za-z]+(?: [A-Za-z]+)*(?: ?\.)?")
"""Lines of words alone: nearly all captions."""
SPLIT_WORDS = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])
"""Words that are two."""


def _either(words: str) -> str:
    return "|".join(words.split())


SPACE = r"[ \t\u00A0\u2000-\u200A\u3000]"
BREAK = rf"(?:{SPACE}|\n)"
LETTER = (
    r"(?:[\p{L}\u00AD\u02C2-\u02C5\u02D2-\u02DF\u02E5-\u036F\u0375-\u0379\u0384\u0385\u03F6\u055A-\u055F]"
    r"|(?=[\u0483-\u0ECE])\p{M}|&[aeiouAEIOU](?i:acute|grave|uml);)"
)
WORD = rf"{LETTER}(?:{LETTER}|\p{{Nd}})*(?:[.!?]{LETTER}(?:{LETTER}|\p{{Nd}})*)*"
APOSTROPHE = r"(?:['\u0092\u2019]|(?i:&apos;))"
ANY_APOSTROPHE = rf"(?:{APOSTROPHE}|[`\u0091\u2018\u201B])"
CLITIC = rf"{APOSTROPHE}(?:[msdMSD]|(?i:re|ve|ll))"
NOT = rf"(?i:n{ANY_APOSTROPHE}t)"
NUMBER = r"[-+]?(?:\p{Nd}+|\p{Nd}*(?:[.:,\u00AD\u066B\u066C]\p{Nd}+)+)"
COUNTRIES = r"(?i:(?:canada|sino|korean|eu|japan|non)-u\.s|u\.s\.-(?:u\.k|u\.s\.s\.r))"
ACRONYM = rf"(?:[A-Za-z](?:\.[A-Za-z])*|{COUNTRIES})"
DOTTED = rf"(?:[A-Za-z](?:\.[A-Za-z])+|{COUNTRIES})"
ATTRIBUTE = r"""[A-Za-z][\w:.-]*(?:[ ]*=[ ]*['"][^\n'"]*['"])?"""
TAG = rf"<(?:[!?][A-Za-z-][^>\n]*|/[A-Za-z][\w:.-]*|[A-Za-z][\w:.-]*(?:[ ]+{ATTRIBUTE})*[ ]*/?)[ ]*>"

# Abbreviations that end a sentence where a capital follows, ...
CLOSING = "(?:(?i:{})|{})".format(
    _either(
        r"jan feb mar apr jun jul aug sept? oct nov dec mon tues? wed thu thurs fri"
        r" ala ariz calif colo conn ct dak fla ga ind kans? ky md mich minn mo mont neb nev okla penn tenn va vt wisc?"
        r" wyo inc cos? corp ltd plc rt bancorp bhd assn univ intl sys tel est ext sq"
        r" jr sr bros (?:ed|ph)\.d blvd rd esq etc seq al bldg"
    ),
    _either(
        r"(?i:pp?t)[ye](?i:s?) (?i:a)z A(?i:z) A(?i:rk) D(?i:el) I(?i:ll) L(?i:a) M(?i:ass) M(?i:iss) O(?i:re)"
        r" P(?i:a) T(?i:ex) W(?i:ash)"
    ),
)
# ... those before a name, where it does not, and those that are one before a number only.
TITLES = "(?:(?i:{})|(?i:m)[ft](?i:g))".format(
    _either(
        r"mr mrs ms drs? profs? sens? reps? attys? lt col gen messrs govs? adm rev maj sgt cpl pvt mt capt ste? ave"
        r" pres lieut hon brig co?mdr pfc spc supts? det adj adv asst assoc ens insp mlle mme msgr sfc invt elec natl"
        r" dept vs alex wm jos cie cf treas ph ft"
    )
)
NUMBERED = f"(?i:{_either('ca figs? prop nos? art bldg pp op')})"
# A sentence begins with these, so that the acronym before them ended one.
OPENERS = "(?:{})".format(
    _either(
        r"A A(?i:bout|ccording|dditionally|fter|n|s|t) B(?i:ut) E(?i:arlier) H(?i:e|er|ere|owever) I(?i:f|n|t)"
        r" L(?i:ast) M(?i:any|ore|r\.|s\.) N(?i:ow) O(?i:nce|ne|ther|ur) S(?i:he|ince|o|ome|uch)"
        r" T(?i:hat|he|heir|hen|here|hese|hey|his) W(?i:e|hen|hile|hat) Y(?i:et|ou)"
    )
)
CONTRACTED = "(?:{})".format(
    _either(
        rf"(?i:{APOSTROPHE}n{APOSTROPHE}?) (?i:[ldj]|dunkin|somethin|ol){APOSTROPHE}"
        rf" (?i:{APOSTROPHE}(?:em|[2-9]0s|till?|cause)) [A-HJ-XZn]{ANY_APOSTROPHE}\p{{L}}{{2,}}"
        rf" \p{{L}}+[aeiouyAEIOUY]{ANY_APOSTROPHE}[aeiouA-Z]\p{{L}}* (?i:o{ANY_APOSTROPHE}o)"
        r" (?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)"
    )
)
ENDINGS = "(?i:{})".format(
    _either(
        r"3gp bat bmp c class cgi cpp dll docx? exe gif gz h html? jar java jpe?g mov mp3 pdf php pl png ppt ps py sql"
        r" tar txt wav xml x zip"
    )
)
PATH = r"""(?:/[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},-])?"""
ADDRESS = (
    rf"""(?:[wW]{{3}}\.(?:[^ \t\n\f\r"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}"""
    rf"""|(?:[^ \t\n\f\r"`'<>|.!?(){{}},-_$]+\.)+(?i:com|net|org|edu)){PATH}"""
)
MAIL = (
    r"""(?:&lt;|<)?[a-zA-Z0-9][^ \t\n\f\r"<>|()\u00A0{}]*@(?:[^ \t\n\f\r"<>|(){}.\u00A0]+\.)*"""
    r"""[^ \t\n\f\r"<>|(){}.\u00A0]+(?:&gt;|>)?"""
)
ELISION = rf"(?:[dDoOlL]{ANY_APOSTROPHE}[\p{{L}}\p{{Nd}}])?"
HYPHENATED = rf"{ELISION}[\p{{L}}\p{{Nd}}]+(?:[-_\u058A\u2010\u2011]{ELISION}[\p{{L}}\p{{Nd}}]+)*"
WITH_HYPHEN = rf"[A-Za-z0-9][A-Za-z0-9.,\u00AD]*(?:-(?:[A-Za-z0-9\u00AD]+|{DOTTED}\.))+"
AMPERSANDED = r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"
PHONE = (
    r"(?:(?:\([0-9]{2,3}\)[ \u00A0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00A0])?[0-9]{2,4}[- \u00A0])"
    r"[0-9]{3,4}[- \u00A0]?[0-9]{3,5}|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5})"
)
SMILEY = r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]"
ASIAN_SMILEY = r"(?:[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\))"
SYMBOLS = (
    r"[+%&~^|\\¦§¨©¬®¯°-º×÷/=<>_•·]|[\u0387\u05BE\u05C0\u05C3\u05C6\u05F3\u05F4\u0600-\u0603\u0606-\u060A\u060C\u0614"
    r"\u061B\u061E\u066A\u066D\u0703-\u070D\u07F6-\u07F8\u0964\u0965\u0E4F\u1FBD\u2016\u2017\u2020-\u2023\u2030-\u2038"
    r"\u203B\u203E-\u2042\u2044\u207A-\u207F\u208A-\u208E\u2100-\u214F\u2190-\u21FF\u2200-\u2BFF\u3012\u30FB\uFF01-\uFF0F"
    r"\uFF1A-\uFF20\uFF3B-\uFF40\uFF5B-\uFF65]"
)

Rewrite = Callable[[str], str]
ROUND = {"(": "-lrb-", ")": "-rrb-"}
BRACKETS = {**ROUND, "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
QUOTES = {
    **dict.fromkeys("\u0091\u2018\u201b\u2039", "`"),
    **dict.fromkeys("\u0092\u2019\u203a", "'"),
    **dict.fromkeys("\u0093\u201c\u00ab", "``"),
    **dict.fromkeys("\u0094\u201d\u00bb", "''"),
    "&apos;": "'",
    '"': "''",
    "&quot;": "''",
}
CURRENCY = {"¢": "cents", "£": "#", "¤": "$", "€": "$", "\u0080": "$", "\u20a0": "$"}
FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">"}


def _replace(*tables: dict[str, str]) -> Rewrite:
    def rewrite(token: str) -> str:
        for table in tables:
            for old, new in table.items():
                token = token.replace(old, new)
        return token

    return rewrite


def _always(word: str) -> Rewrite:
    return lambda token: word


def _opening(token: str) -> str:
    return "``" if token in ('"', "&quot;") else "`"


def _whole(token: str) -> str:
    return token.replace("\u00ad", "")


SPACES_STAY = {" ": "\u00a0"}
"""A space inside a token is a hard one."""


RULES: list[tuple[str, Rewrite]] = [
    (r"[cC]\+\+|(?i:[cf])\#", _whole),
    (r"(?i:(can)not|('t)was)", _whole),
    (r"(?i:&nbsp;)", _always("")),
    (r"((?i:gon|wan))(?i:na)|((?i:got))(?i:ta)|((?i:lem|gim))(?i:me)", _whole),
    (r"('(?i:t))(?i:is)", _whole),
    (TAG, _replace(SPACES_STAY)),
    (r"-{5,}", _whole),
    (r"&(?i:md|mdash|ndash);|[\u0096\u0097\u2013-\u2015]|-{2,}", _always("--")),
    (r"(?i:&amp;)", _always("&")),
    (r"&(?i:ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);", _whole),
    (rf"({WORD}){CLITIC}", _whole),
    (rf"([A-Za-z]*[A-MO-Za-mo-z]\u00AD*){NOT}", _whole),
    (WORD, _whole),
    (CONTRACTED, _whole),
    (rf"((?i:y){APOSTROPHE})\p{{L}}", _whole),
    (r"""(?i:https?)://[^ \t\n\f\r"<>|()]+[^ \t\n\f\r"<>|.!?(){},-]""", _whole),
    (ADDRESS, _whole),
    (MAIL, _whole),
    (r"@[A-Za-z_][a-zA-Z_0-9]*|\#" + f"{LETTER}+", _whole),
    (rf"({CLITIC}|{NOT})[^A-Za-z]", _replace(QUOTES)),
    (r"\p{Nd}{1,2}[-/]\p{Nd}{1,2}[-/]\p{Nd}{2,4}", _whole),
    (NUMBER, _whole),
    (r"[\u207A\u207B\u208A\u208B]?(?:[\u2070¹²³\u2074-\u2079]+|[\u2080-\u2089]+)", _whole),
    (r"(?:\p{Nd}{1,4}[- \u00A0])?\p{Nd}{1,4}(?:\\?/|\u2044)\p{Nd}{1,4}", _replace(SPACES_STAY)),
    (r"[\u00BC-\u00BE\u2153-\u215E]", _replace(FRACTIONS)),
    (r"(?i:-[rl][rcs]b-|c\.d\.s|pro-|anti-|s(?:&|&amp;)p-500|s(?:&|&amp;)ls)", _replace(ENTITIES)),
    (rf"(?i:cap{APOSTROPHE}n|c{APOSTROPHE}est)", _whole),
    (SLASHED, _whole),
    (r"[A-Z]*\$|\#", _whole),
    (r"[\u00A2-\u00A5\u0080\u20A0\u20A4\u20AC\u060B\u0E3F\uFFE0\uFFE1\uFFE5\uFFE6]", _replace(CURRENCY)),
    (rf"({CLOSING}\.){BREAK}(?:{BREAK}|[A-Z]|{TAG})", _whole),
    (rf"({CLOSING}\.)[\s\S]{{2}}", _whole),
    (rf"({CLOSING}\.)", _whole),
    (rf"([A-Za-z])\.{BREAK}+(?:{OPENERS}|{TAG}){BREAK}", _whole),
    (rf"({DOTTED}\.){BREAK}+(?:{OPENERS}|{TAG}){BREAK}", _whole),
    (rf"(?:{TITLES}|{ACRONYM})\.", _whole),
    (rf"({NUMBERED}\.){BREAK}?\p{{Nd}}", _whole),
    (rf"({TITLES}|{ACRONYM}){BREAK}", _whole),
    (rf"({APOSTROPHE}[0-9][0-9]){BREAK}", _whole),
    (rf"((?:{LETTER}|\p{{Nd}})+(?:\.(?:{LETTER}|\p{{Nd}})+)*\.{ENDINGS})(?:{BREAK}|[.?!,])", _whole),
    (rf"((?:{WORD}|{HYPHENATED}|{WITH_HYPHEN}|{AMPERSANDED})\.)[,;:\u3001]", _whole),
    (PHONE, _replace(SPACES_STAY, ROUND)),
    (r"""("|(?i:&quot;))[A-Za-z0-9$]""", _opening),
    (r"""["]|(?i:&quot;)""", _replace(QUOTES)),
    (rf"({SMILEY})[^A-Za-z0-9]", _replace(ROUND)),
    (ASIAN_SMILEY, _replace(ROUND)),
    (r"[\[\](){}]", _replace(BRACKETS)),
    (r"\.{3,5}|(?:\.[ \u00A0]){2,4}\.|[\u0085\u2026]", _always("...")),
    (r"@+|_+|\*+|(?:\\\*){1,3}|\#+", _whole),
    (r"[,;:\u3001.?!¡¿\u037E\u0589\u061F\u06D4\u0700-\u0702\u3002-]|[?!]+", _whole),
    (HYPHENATED, _whole),
    (WITH_HYPHEN, _whole),
    (AMPERSANDED, _replace(ENTITIES)),
    (r"(')[A-Za-z][^ \t\n\u00A0]", _opening),
    (CLITIC, _replace(QUOTES)),
    (NOT, _replace(QUOTES)),
    (rf"{APOSTROPHE}|''|[`\u2018-\u201F\u0091-\u0094\u2039\u203A\u00AB\u00BB]{{1,2}}", _replace(QUOTES)),
    (r"<<|>>", _whole),
    (r"(?i:&lt;)|(?i:&gt;)", _replace(ENTITIES)),
    (SYMBOLS, _whole),
]  # fmt: skip
"""Patterns, first come first served, and what becomes of the token: the first group, or the whole of the match."""


@cache
def _rules() -> list[tuple[regex.Pattern[str], Rewrite]]:
    return [(regex.compile(f"(?p){pattern}", regex.V0), rewrite) for pattern, rewrite in RULES]


@cache
def _abbreviations() -> regex.Pattern[str]:
    """Words that may keep a full stop."""
    return regex.compile(rf"{CLOSING}|{TITLES}|[a-z]", regex.IGNORECASE | regex.V0)


def _tokens(line: str) -> list[str]:
    tokens, place, end = [], 0, len(line)
    line += "\n\n"  # what stands before the next caption
    while place < end:
        if line[place].isspace():
            place += 1
            continue
        longest, token, rewrite = 0, "", _whole
        for pattern, change in _rules():
            found = pattern.match(line, place)
            if found and found.end() - place > longest:
                longest, rewrite = found.end() - place, change
                token = next((group for group in found.groups() if group), found[0])
        place += len(token) or 1  # a sign of no rule is left out
        if token and (token := rewrite(token)):
            tokens.append(token.lower())
    return tokens


def caption_words(line: str) -> list[str]:
    """The words that the caption metrics count: `"A dog's toy."` has a, dog, 's, toy.

    Never raises; a line without a word gives an empty list.
    """
    if PLAIN.fullmatch(line):
        words = line.lower().rstrip(" .").split()
        stopped = line.endswith(".") and not line.endswith(" .")
        if not SPLIT_WORDS.intersection(words) and not (stopped and _abbreviations().fullmatch(words[-1])):
            return words
    return [token for token in _tokens(line) if token not in PUNCTUATION]
