"""Words of a caption as the COCO caption toolkit counts them: Penn Treebank tokenization, without Java.

The toolkit runs Stanford's PTBTokenizer 3.4.1 on each text (one line, folded to lower case) and drops a list of
punctuation. The rules here follow the conventions of the Treebank (Marcus et al., 1993; Bies et al., 1995): clitics
are words ("do n't", "man 's"), hyphenated words and numbers stay whole, brackets have names ("-lrb-"), abbreviations
keep their full stop. Which words are abbreviations, and where the conventions leave a choice, was measured on that
program; tests/golden/treebank.json holds texts with its output.
"""

import functools
import html
import re

# What the toolkit drops, as it stands in a text. Brackets stay: its list has their names in upper case, by mistake.
_DROPPED = re.compile(r'[.?!,:;]|\.+|-{1,4}|[\'`"“”‘’‛«»‹›‐‑‒–—―…\xa0\x00-\x1f\x7f-\x9f\U00010000-\U0010ffff]')
_RENAMED = str.maketrans({
    '(': '-lrb-', ')': '-rrb-', '[': '-lsb-', ']': '-rsb-', '{': '-lcb-', '}': '-rcb-', '£': '#', '€': '$',
    '¢': 'cents', '¼': '1/4', '½': '1/2', '¾': '3/4', '⅓': '1/3', '⅔': '2/3'})

# Keep their full stop: always; if not in lower case; before a number.
_ABBREVIATIONS = '''
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt cf
    cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga
    gen gov govs hon inc ind insp intl jan jos jr jul jun kan ky lieut lt ltd maj mar md messrs mfg mich minn mme mo mon
    mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph\\.d ph plc pres prof profs pte pty pvt rd rep reps
    rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs treas tue tues univ va vs vt wed
    wis wisc wm wyo'''
_CAPITALIZED = 'ark az del ill la mass miss ore pa tex wash'
_BEFORE_NUMBERS = 'art ca fig figs no nos op pp prop'
# A single letter keeps its full stop, as an initial, unless one of these begins the next sentence.
_STARTERS = '''
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One
    Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You'''


def _any(words: str) -> str:
  return f"(?:{'|'.join(words.split())})"


_L, _A, _Q = r'[^\W\d_¼½¾⅓⅔]', r'[^\W_¼½¾⅓⅔]', "['’]"  # a letter; a letter or digit; an apostrophe
_END = rf'(?!{_A})'
_CLITIC = rf'(?i:{_Q}(?:s|m|d|re|ve|ll)){_END}'
_WORD = rf'{_A}+(?:_{_A}+)*'
_HYPHENATED = rf'{_WORD}(?:[-‐‑]{_WORD})*'

# Ends before the longest match: verbs before "n't", the first parts of six contractions, 't of "'tis" and "'twas".
_SPLIT = re.compile(
    rf'(?i:{_L}*[^\W\d_n](?=n{_Q}t{_END})|n{_Q}t{_END}|\'t(?=is|was)'
    rf'|(?:can(?=not)|gim(?=me)|gon(?=na)|got(?=ta)|lem(?=me)|wan(?=na))(?=(?:not|na|ta|me)(?!{_Q}?{_A})))|{_CLITIC}')
# Otherwise the longest match is taken, of equally long ones the first.
_LONGEST = tuple(map(re.compile, (
    _HYPHENATED,
    rf'{_A}+(?:-{_A}+)*(?:/{_A}+(?:-{_A}+)*){{1,2}}',  # and/or, 1/2, 3/4-inch
    r'[-+]?(?:\d+(?:[.:,]\d+)*|(?:[.:,]\d+)+)', rf'\d+(?:[.,]\d+)+(?:-{_A}+)+',  # -5, 1,000.5, 10:30; 3.5-inch
    # Full stops: inside words, after abbreviations and initials, and before another punctuation mark.
    rf'{_L}{_A}*(?:\.{_L}{_A}*)+(?:-{_A}+)*', rf'(?:{_A}+-)*(?:{_L}\.){{2,}}(?:-(?:(?:{_L}\.)+|{_A}+))*',
    rf'(?i:{_any(_ABBREVIATIONS)})\.', rf'(?!{_any(_CAPITALIZED)})(?i:{_any(_CAPITALIZED)})\.',
    rf'(?i:{_any(_BEFORE_NUMBERS)})\.(?=\s*\d)', rf'{_L}\.(?!\s+{_any(_STARTERS)}(?:\s|$))',
    rf'{_HYPHENATED}\.(?=[,;:])',
    # Apostrophes: inside O'Neil, l'amour, ne'er and some words, after and before others, '90s.
    rf'(?:[dlno]|[A-HJ-XZ])(?!{_CLITIC}|{_Q}n{_Q}){_Q}{_L}+', rf'{_L}+[aeiouyAEIOUY]{_Q}[aeiouAEIOU]{_L}*',
    rf'(?i:c{_Q}est|c{_Q}mon|cap{_Q}n|d{_Q}ye|e{_Q}er|ev{_Q}ry|li{_Q}l|s{_Q}mores){_END}',
    rf'(?i:(?:[djl]|ol|somethin){_Q}|y{_Q}(?={_L})|{_Q}n{_Q}|{_Q}(?:cause|em|n|till?){_END})',
    rf'(?<!{_A}){_Q}[1-9]\d(?:s{_END}|(?=\s|$))',
    # Names with an ampersand, addresses, tags, tokens of models (<unk>), entities, smileys, currencies.
    rf'[A-Z]+(?:&[A-Z]+)+{_END}', rf'{_L}+[!?]{_L}+', r'[cC](?:\+\+|#)', r'[A-Z]{1,2}\$', r'https?://[^\s()[\]]*[\w/]',
    rf'{_A}+(?:\.{_A}+)*\.(?:com|edu|net|org)/\S*[\w/]', rf'{_A}+(?:[-.+_]{_A}+)*@{_A}+(?:[-.]{_A}+)*',
    rf'[#@]{_L}\w*', r'</?[A-Za-z!_?][-\w.:]*/?>', r'&(?:amp|lt|gt|quot|apos|nbsp);', rf">?[:;=]['-]?[()DPp]{_END}",
    r'[?!]+', r'\*+', r'_+', r'-+', r'\.+', r'\S')))
_PLAIN = re.compile(r'[A-Za-z]+(?=\s|$)')
_CONTRACTED = frozenset('cannot gimme gonna gotta lemme wanna'.split())
_SPACES = re.compile(r'\s*')


@functools.lru_cache(1 << 16)  # Several metrics of one evaluation read the same texts.
def words(text: str) -> tuple[str, ...]:
  """Returns the words of a text, in lower case and without punctuation.

  "The man's dogs aren't here (yet)." → ('the', 'man', "'s", 'dogs', 'are', "n't", 'here', '-lrb-', 'yet', '-rrb-').
  """
  text, kept, position = text.replace('\xad', ''), [], 0
  while (position := _SPACES.match(text, position).end()) < len(text):
    token = _token(text, position)
    position += len(token)
    token = html.unescape(token) if token[0] == '&' else token
    if not _DROPPED.fullmatch(token):
      token = token.replace('’', "'") if _SPLIT.fullmatch(token) else token
      kept.append(token.translate(_RENAMED).lower())
  return tuple(kept)


def _token(text: str, position: int) -> str:
  """The token of a text that starts at a position, which is no space."""
  plain = _PLAIN.match(text, position)
  if plain and plain[0].lower() not in _CONTRACTED:
    return plain[0]
  if split := _SPLIT.match(text, position):
    return split[0]
  return max((match[0] for pattern in _LONGEST if (match := pattern.match(text, position))), key=len)
