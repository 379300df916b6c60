"""Sentences for the demo corpus: a small grammar over a few hundred common English words.

The sentences are plain nonsense ("Two loud geese counted the cheap oranges at noon."): what matters is that the words
are many, short and often alike in sound (pan, pen, pin, pine), so that phones meet in many contexts, and that every
phone of English is there.
"""

import random


def _words(text: str) -> list[str]:
    return text.split()


PEOPLE = _words("""
    Anna Ben Carl Dan Dora Ed Fay Finn George Hugh Jack Jean Joan Joyce Kate Ken Liz Luke Mark Meg Ned Nora Paul Pete
    Phil Ralph Roy Ruth Sam Sean Tom Vicky Will Zoe
""")
SINGULAR = _words("""
    ant apple arm aunt baby badge bag ball band barn basket bat bath bear bed bee bell belt bench bike bird boat bone
    book boot bottle bowl box boy branch bread brick bridge broom brother brush bucket bun bus cab cage cake camel
    camp can candle cap car card cart cat cave chain chair cheese chef chess chick chimney church clock cloud coach
    coat coin comb cook corn couch cow crab crown cup dad deer dish dog doll door drum duck engine fan farm father
    feather fence field fish flag flame flower fog fork fox frog game garage garden gate ghost gift girl glove goat
    goose grape guard gun hall ham hammer hat hawk hen hill hook horn horse hotel house hut jacket jam jar jet joke
    judge jug juice key king kitchen kite knee knife lake lamb lamp leaf lemon letter lid lock log lord maid mail map
    match measure meat mill mirror monkey moon mother motor mouse mouth mud mule nail neck needle nest net nose nurse
    nut oak oil onion orange oven owl ox page pan path peach pear pen pencil phone pie pig pilot pin pine pipe pit
    planet plate poet pool pot prince pup purse queen rabbit rain rat ring river road robe rock roof room root rope
    rose rug ruler sack sail salt sand sauce school sea seat shed sheep shelf shell ship shirt shoe shop shoulder sink
    sister sock song soup spoon star stone stool stove street suit sun table tail tape tea teacher tent thief thorn
    thumb tin toad toe tongue tooth toy train treasure tree truck tube turkey uncle van vase vest vision voice wagon
    wall watch wave web whale wheel wheat wife window wing wolf wood worm yacht yard yolk zebra zoo
""")
PLURAL = _words("""
    ants babies badges bags bears beds bells birds boats books boots boys brushes buckets cages cakes cans cars cats
    chains chairs children clocks coats coins cooks cousins cows cups deer dishes dogs doors ducks eggs farmers feet
    fields foxes friends geese ghosts girls goats guards hats hens horses houses jars judges keys kings kites knives
    lambs leaves lemons maps men mice mothers nails nurses owls oxen pans peaches pears pens pies pigs pilots pins
    poets queens rings rocks ropes roses sailors shells ships shoes singers sisters socks songs soldiers spoons stars
    stones teachers teeth thieves toads toys treasures trees uncles vases voices whales wheels women worms yaks zebras
""")
ADJECTIVES = _words("""
    angry bad beige big bitter black blue bold brave bright broken brown calm cheap clean clever cold cool cruel cute
    damp dark dear deep dirty dry dull eager early easy empty faint fair false fat fine flat fresh full funny gentle
    good grand gray great green happy hard heavy high hollow hot huge hungry joyful keen kind large late lazy lean
    little lonely long loose loud low lucky mad mild narrow nasty neat new nice noisy odd old orange pale pink plain
    polite poor pretty proud pure quick rare raw red rich ripe rough round royal rusty sad safe shallow sharp short
    shy sick silent silly slim slow small smooth soft sour square steep stiff strange strong sudden sweet tall tame
    thick thin tiny tough ugly usual vague vast warm weak wet white whole wide wild wise wooden worn yellow young
""")
PAST = _words("""
    asked bit blamed bought broke brought brushed burned called carried caught changed chased checked chose cleaned
    copied counted covered crossed cut doubted drew dropped enjoyed faced fed felt fetched filled fixed followed
    forgot found fought gave guarded guessed heard held helped hid hit hugged joined judged kept kicked kissed knew
    left lifted liked loved lost made measured met missed mixed moved named needed noticed offered opened ordered
    owned packed painted passed picked pleased pulled pushed put raised reached refused rolled sang saved saw served
    shared shook showed smelled sold stole stopped stretched taught thanked threw took touched traded trusted turned
    used viewed wanted warned washed watched weighed welcomed
""")
BASE = _words("""
    ask bite blame borrow bring brush buy call carry catch change chase check choose clean copy count cover cut doubt
    draw drop enjoy face feed fetch fill find fix follow forget give guard guess hear help hide hit hold hug join
    judge keep kick kiss know leave lift like love make measure meet miss mix move need notice offer open order own
    pack paint pass pick please pull push raise reach refuse roll save see sell serve shake share show smell steal
    stop stretch take teach thank throw touch trade trust turn use view wake warn wash watch weigh welcome
""")
NUMBERS = _words("""
    two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety
""")
PLACES = _words("""
    above/the/barn across/the/field along/the/shore around/the/pool at/church at/home at/school behind/the/shed
    below/the/bridge beside/the/road by/the/sea down/the/hill from/the/north in/the/garage in/the/house in/the/woods
    inside/the/cave near/the/lake off/the/coast on/the/beach on/the/roof outside/the/town over/the/fence past/the/mill
    through/the/fog toward/the/harbor under/the/oak up/the/path with/both/hands without/a/sound
""")
TIMES = _words("""
    after/lunch all/day at/dawn at/noon at/once before/breakfast each/month every/year in/August in/July in/May
    in/winter last/night last/Thursday on/Friday on/Monday on/Tuesday this/morning this/week twice/a/day yesterday
""")
ADVERBS = _words("""
    again badly calmly carefully easily finally gladly hardly kindly loudly neatly never often once poorly proudly
    quickly rarely roughly sadly slowly softly soon suddenly usually warmly wisely
""")
OWNERS = _words("""
    the the the a this that my your his her our their each every another
""")
OWNERS_OF_MANY = _words("""
    the the some these those my your his her our their both all
""")
QUESTIONS = _words("""
    Why/did When/did How/did Where/will Should Could Must Would Who/thought
""")

# Each capital word is replaced by a random word of that kind, each in lower case stays.
PATTERNS = (
    "OBJECT PAST OBJECT PLACE",
    "OBJECT ADVERB PAST OBJECT TIME",
    "PERSON and PERSON PAST OBJECT PLACE",
    "TIME , PERSON PAST OBJECT and OBJECT",
    "PERSON will BASE OBJECT PLACE TIME",
    "QUESTION OBJECT BASE OBJECT PLACE",
    "PLACE , OBJECT ADVERB PAST PERSON",
    "OBJECT looked ADJECTIVE , but OBJECT seemed ADJECTIVE and ADJECTIVE",
    "PERSON PAST OBJECT , PAST OBJECT , and PAST OBJECT",
    "please BASE OBJECT , PERSON , or BASE OBJECT TIME",
)
_KINDS = {
    "PERSON": PEOPLE,
    "ADJECTIVE": ADJECTIVES,
    "PAST": PAST,
    "BASE": BASE,
    "PLACE": PLACES,
    "TIME": TIMES,
    "ADVERB": ADVERBS,
    "QUESTION": QUESTIONS,
}

# Few words that differ in one phone: ABX compares phones between the same two neighbours.
_PAIR_KINDS = {
    "NOUN": _words("""
        bat bit boat boot bite cat kit coat cut kite hat hut heat pan pin pen pine fan fin phone mat mitt moat cap cup
        cape ship shop sheep shape chip chop jeep rock rack rake lock lake leg log bag bug back book
    """),
    "VERB": _words("""
        bought caught fought taught sought hid had heard hit cut sold told held called
    """),
    "WHERE": _words("""
        by/the/bay by/the/boy on/the/bed on/the/road in/the/mud in/the/shed at/noon at/night
    """),
}
PAIR_PATTERNS = (
    "the NOUN VERB the NOUN and the NOUN WHERE",
    "the NOUN and the NOUN VERB the NOUN WHERE",
    "the NOUN VERB the NOUN or VERB the NOUN and the NOUN",
)


def _object(rng: random.Random) -> list[str]:
    """Return a group of words around a noun: its owner or number, at times an adjective, the noun."""
    adjective = [rng.choice(ADJECTIVES)] if rng.random() < 0.6 else []
    kind = rng.random()
    if kind < 0.55:
        words = [rng.choice(OWNERS), *adjective, rng.choice(SINGULAR)]
        if words[0] in {"a", "another"} and words[1][0] in "aeiou":
            words[0] = "one"
        return words
    if kind < 0.8:
        return [rng.choice(OWNERS_OF_MANY), *adjective, rng.choice(PLURAL)]
    return [rng.choice(NUMBERS), *adjective, rng.choice(PLURAL)]


def make_sentence(rng: random.Random, *, minimal_pairs: bool = False) -> str:
    """Return one random sentence of about 7 to 14 words, with its capital and its full stop or question mark.

    Args:
        rng: where the chances come from.
        minimal_pairs: take few words, alike in sound, instead of many.
    """
    words: list[str] = []
    kinds = _PAIR_KINDS if minimal_pairs else _KINDS
    pattern = rng.choice(PAIR_PATTERNS if minimal_pairs else PATTERNS).split()
    for part in pattern:
        if part == "OBJECT":
            words += _object(rng)
        else:
            words += rng.choice(kinds[part]).split("/") if part in kinds else [part]
    text = " ".join(words).replace(" ,", ",")
    return text[0].upper() + text[1:] + ("?" if pattern[0] == "QUESTION" else ".")


def make_sentences(rng: random.Random, count: int, taken: set[str], *, minimal_pairs: bool = False) -> list[str]:
    """Return `count` random sentences that are not in `taken`, and put them there."""
    sentences: list[str] = []
    while len(sentences) < count:
        sentence = make_sentence(rng, minimal_pairs=minimal_pairs)
        if sentence not in taken:
            taken.add(sentence)
            sentences.append(sentence)
    return sentences
