"""Phones in a phonetician's order, whatever an alignment calls them: the rows of the phone-by-unit picture.

Three ways of writing are known: ARPAbet (`AH0`, `sh`; also TIMIT's closures and the demo's vowels with an r), the
mnemonics of espeak-ng (`'i:`, `tS`), and IPA. Some names mean different sounds (`V` is a fricative in ARPAbet and a
vowel for espeak-ng), so the way of writing is settled for all phones together: the one that knows most of them.
"""

from collections.abc import Sequence

from hubert.data.phones import is_noise, is_silence

VOWELS, APPROXIMANTS, NASALS, STOPS, AFFRICATES, FRICATIVES, SILENCE, OTHER = CLASSES = (
    "vowels",
    "approximants",
    "nasals",
    "stops",
    "affricates",
    "fricatives",
    "silence",
    "other",
)

# Vowels run from front to back, consonants from the lips to the throat.
ARPABET = {
    VOWELS: "IY IH IX IHR EY EH EHR AE AY AA AAR AW AH AX AXH AX-H ER AXR AO AOR OY OW UH UHR UW UX",
    APPROXIMANTS: "W WH L EL R Y",
    NASALS: "M EM N EN NX NG ENG",
    STOPS: "P PCL B BCL T TCL D DCL DX K KCL G GCL Q",
    AFFRICATES: "CH JH",
    FRICATIVES: "F V TH DH S Z SH ZH HH HV",
}
ESPEAK = {
    VOWELS: "i: i i@ i@3 I I2 I# I2# e: eI e@ E E# E2 a aa a2 aI aI@ aI3 a# A: A@ A# 0 0# 02 aU aU@ V @ @2 @5 3: 3 "
    "O: O O2 O@ o@ o: OI oU U U@ u:",
    APPROXIMANTS: "w w# l l- @L r r- r/ R j",
    NASALS: "m m- n n- N N-",
    STOPS: "p b t t2 t# d d# k g ?",
    AFFRICATES: "tS dZ ts",
    FRICATIVES: "f v T D s z S Z C x h",
}
# By the first letter of a phone; the affricates are two letters, looked for first.
IPA = {
    AFFRICATES: "tʃ dʒ ts dz tɕ dʑ tʂ dʐ ʈʂ ɖʐ pf",
    VOWELS: "i y ɪ ʏ e ø ɛ œ æ a ɶ ɨ ʉ ɘ ɵ ə ɜ ɝ ɚ ɞ ɐ ʌ ɑ ɒ ɔ o ɤ ʊ u ɯ",  # noqa: RUF001
    APPROXIMANTS: "w ʍ ʋ l ɫ ɭ ʎ ʟ ɹ ɻ r ʀ j ɥ ɰ",  # noqa: RUF001
    NASALS: "m ɱ n ɳ ɲ ŋ ɴ",
    STOPS: "p b t d ɾ ɽ ʈ ɖ c ɟ k ɡ g q ɢ ʔ",  # noqa: RUF001
    FRICATIVES: "ɸ β f v θ ð s z ʃ ʒ ɕ ʑ ʂ ʐ ç ʝ x ɣ χ ʁ ħ ʕ h ɦ",  # noqa: RUF001
}
_STRESS_OF_ESPEAK = "',%="
_STRESS_OF_IPA = "ˈˌ"

Place = tuple[int, int]  # number of the class, place in it


def order_phones(phones: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Group phones by class.

    Args:
        phones: names as they stand in the alignment.

    Returns:
        (class, indices into `phones` in their order) for each class that occurs. Names that the settled way of writing
        does not know come last, by the alphabet, as "other".
    """
    ways = (_places_in_arpabet(phones), _places_in_espeak(phones), _places_in_ipa(phones))
    places = max(ways, key=lambda way: sum(place is not None for place in way))
    groups: dict[str, list[tuple[Place, str, int]]] = {name: [] for name in CLASSES}
    for index, (phone, known) in enumerate(zip(phones, places, strict=True)):
        is_no_phone = is_silence(phone) or is_noise(phone)
        place = (CLASSES.index(SILENCE), 0) if is_no_phone else known or (CLASSES.index(OTHER), 0)
        groups[CLASSES[place[0]]].append((place, phone, index))
    return [(name, [index for _, _, index in sorted(members)]) for name, members in groups.items() if members]


def _table(inventory: dict[str, str]) -> dict[str, Place]:
    names = {name: members.split() for name, members in inventory.items()}
    return {
        phone: (CLASSES.index(name), place) for name, members in names.items() for place, phone in enumerate(members)
    }


def _places_in_arpabet(phones: Sequence[str]) -> list[Place | None]:
    table = _table(ARPABET)
    return [table.get(phone.upper().rstrip("012")) for phone in phones]


def _places_in_espeak(phones: Sequence[str]) -> list[Place | None]:
    table = _table(ESPEAK)
    return [table.get(phone.lstrip(_STRESS_OF_ESPEAK).rstrip(";")) for phone in phones]


def _places_in_ipa(phones: Sequence[str]) -> list[Place | None]:
    table = _table(IPA)
    bare = [phone.lstrip(_STRESS_OF_IPA).replace("\N{COMBINING DOUBLE INVERTED BREVE}", "") for phone in phones]
    return [table.get(name[:2]) or table.get(name[:1]) for name in bare]
