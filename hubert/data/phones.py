"""How alignments spell silence and noise, the two labels that are no phones."""

SILENCE = "SIL"  # the one name under which all spellings count
SILENCES = frozenset(
    {"", "sil", "sp", "<eps>", "<sil>", "[sil]", "h#", "pau", "epi", "_", "_:", "_|", "#"}  # in lower case
)
NOISES = frozenset({"spn", "<spn>", "nsn", "<unk>"})  # in lower case; spoken noise, other noise, an unknown word


def is_silence(label: str) -> bool:
    """Return True if a label of an alignment means silence, in upper or lower case."""
    return label.strip().lower() in SILENCES


def is_noise(label: str) -> bool:
    """Return True if a label of an alignment means noise or a word that the aligner does not know."""
    return label.strip().lower() in NOISES
