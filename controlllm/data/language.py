"""The language of a text, offline: py3langid's model comes with the package."""

from importlib.util import find_spec

from controlllm.errors import UserError

LIBRARY = "py3langid"
UNKNOWN = "und"
"""What has no language: nothing but digits and signs."""
_CODES = (
    "ace af am an ar ary arz as az ba bcl be bg bn br bs ca crh cs cy da de dz el en eo es et eu ext fa fi fo fr fuv fy"
    " ga gcf gcr gd gl gom grc gu gug guw ha hbo he hi hr ht hu hy id ig is it ja jv ka kab kik kk km kn ko ku ky la lb"
    " lg lij ln lo lt ltg lv mg mk ml mn mr ms mt my ne nl nn no nso oc om or pa pcm pl ps pt qu ro ru rw sa sdh se si"
    " sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz uzs vec vi vo wa wuu xh yo yue zh zu"
)
LANGUAGES = frozenset(_CODES.split())
"""ISO 639 codes that can be told apart; listed here so that a recipe is checked without loading the model."""
# Written alike: short texts in traditional characters are often taken for the others.
_CHINESE = frozenset(("yue", "wuu", "zh"))
# More text than this tells nothing more.
_CHARACTERS = 2000


def language_of(text: str) -> str:
    """One of LANGUAGES, with every written Chinese as `zh`, or UNKNOWN where there is nothing to go by."""
    from py3langid import classify  # type: ignore[import-not-found]

    head = text[:_CHARACTERS]
    if not any(map(str.isalpha, head)):
        return UNKNOWN
    code = str(classify(head)[0])
    if code in _CHINESE:
        return "zh"
    return code if code in LANGUAGES else UNKNOWN


def require() -> None:
    """Says in one line what to install, without loading the model."""
    if find_spec(LIBRARY) is None:
        raise UserError(f"{LIBRARY} is not installed; pip install 'controlllm[language]'")
