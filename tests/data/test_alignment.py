"""Aligning translations: by headings, by counts, by lengths; what is no translation is left out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.data.alignment import align, sentences
from moesaic.data.gale_church import Bead, align_lengths, deviation
from moesaic.errors import DataError

ENGLISH = """1.1. About cats

The cat sits quietly upon the warm red mat today.

Nobody knows what she is thinking about all day long.

# ls -l /etc/passwd

1.2. About dogs

Dogs run. They bark at everything that moves in the garden!"""

FRENCH = """1.1. Des chats

Le chat est assis tranquillement sur le tapis rouge et chaud.

Personne ne sait à quoi elle pense du matin jusqu'au soir.

# ls -l /etc/passwd

1.2. Des chiens

Les chiens courent. Ils aboient contre tout ce qui bouge au jardin !"""

CHINESE = """1.1. 关于猫

今天猫静静地坐在温暖的红垫子上。

Nobody knows what she is thinking about all day long.

# ls -l /etc/passwd

1.2. 关于狗

狗在跑。它们对花园里一切会动的东西吠叫！"""


def test_paragraphs_between_headings():
    aligned = align({"en": ENGLISH, "fr": FRENCH, "zh": CHINESE})
    assert [group["en"][:9] for group in aligned.groups] == [
        "1.1. Abou",
        "The cat s",
        "Nobody kn",
        "1.2. Abou",
        "Dogs run.",
    ]
    assert [set(group) for group in aligned.groups] == [
        {"en", "fr", "zh"},
        {"en", "fr", "zh"},
        {"en", "fr"},  # the Chinese one was left in English
        {"en", "fr", "zh"},
        {"en", "fr", "zh"},
    ]
    assert aligned.groups[1]["zh"] == "今天猫静静地坐在温暖的红垫子上。"
    assert aligned.left_out == {"fr: not translated": 1, "zh: not translated": 2}  # the command in both
    assert (aligned.sections, aligned.even_sections) == (4, 4)


def test_sentences():
    aligned = align({"en": ENGLISH, "fr": FRENCH, "zh": CHINESE}, "sentence")
    assert {"en": "Dogs run.", "fr": "Les chiens courent.", "zh": "狗在跑。"} in aligned.groups


def test_a_missing_paragraph_harms_its_neighbour_alone():
    """Lengths cannot tell a paragraph that is missing from one that was joined to the one before."""
    without = FRENCH.replace("Personne ne sait à quoi elle pense du matin jusqu'au soir.\n\n", "")
    long = ENGLISH.replace("all day long.", "all day long, for cats keep silent about everything that matters to them.")
    # Enough other text that one wrong pair does not tell how long French is.
    long += (
        "\n\n1.3. About birds\n\nBirds wake up long before the sun does, and they sing in every tree of the old garden "
    )
    long += "until the last star has gone and the people of the house open their windows."
    without += (
        "\n\n1.3. Des oiseaux\n\nLes oiseaux se réveillent bien avant le soleil, et ils chantent dans chaque arbre "
    )
    without += "du vieux jardin jusqu'à ce que la dernière étoile ait disparu et que les gens ouvrent leurs fenêtres."
    aligned = align({"en": long, "fr": without})
    assert (aligned.sections, aligned.even_sections) == (3, 2)
    assert {"en": "1.2. About dogs", "fr": "1.2. Des chiens"} in aligned.groups
    assert [group["fr"][:9] for group in aligned.groups if group["en"].startswith("Dogs")] == ["Les chien"]
    assert sum("Le chat" in group["fr"] for group in aligned.groups) <= 1


def test_texts_of_implausible_length_are_left_out():
    long = ENGLISH + "\n\nVery short."
    aligned = align({"en": long, "fr": FRENCH + "\n\n" + "Une phrase sans rapport aucun. " * 20})
    assert aligned.left_out["fr: length"] == 1
    assert len(aligned.groups) == len(align({"en": ENGLISH, "fr": FRENCH}).groups)


def test_repeated_groups_come_once():
    doubled = [text.replace("1.2.", "\n\nWarning signs\n\n1.2.") + "\n\nWarning signs" for text in (ENGLISH, FRENCH)]
    doubled[1] = doubled[1].replace("Warning signs", "Signaux d'alerte")
    groups = align(dict(zip(("en", "fr"), doubled, strict=True))).groups
    assert sum(group["en"] == "Warning signs" for group in groups) == 1


@pytest.mark.parametrize(("texts", "words"), [({"en": "a"}, "1 languages"), ({"en": "a", "fr": " \n\n "}, "'fr'")])
def test_mistakes(texts, words):
    with pytest.raises(DataError, match=words):
        align(texts)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("See section 1.2. Debian is free.", ["See section 1.2. Debian is free."]),
        ("Run dpkg-reconfigure. then wait", ["Run dpkg-reconfigure. then wait"]),
        ("Il dit « oui. » Elle part.", ["Il dit « oui. »", "Elle part."]),
        ("一个。两个！“三个？”四个", ["一个。", "两个！", "“三个？”", "四个"]),
        ("¿Qué? ¡Sí!", ["¿Qué?", "¡Sí!"]),
        ("", []),
    ],
)
def test_where_sentences_end(text, cut):
    assert [piece.replace("\xa0", " ") for piece in sentences(text)] == cut


def test_gale_church_merges_and_skips():
    assert align_lengths([100, 50, 55, 200], [101, 104, 199], 1.0) == [
        Bead(0, 1, 0, 1),
        Bead(1, 3, 1, 2),
        Bead(3, 4, 2, 3),
    ]
    assert align_lengths([100, 200, 300], [50, 150], 0.5)[0] == Bead(0, 1, 0, 1)
    assert align_lengths([300, 20, 300], [300, 300], 1.0)[1].other_first == 1


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 300), max_size=9),
    other=st.lists(st.integers(1, 300), max_size=9),
    ratio=st.floats(0.2, 3),
)
def test_every_part_is_in_one_bead_in_order(lengths, other, ratio):
    beads = align_lengths(lengths, other, ratio)
    assert [i for bead in beads for i in range(bead.first, bead.end)] == list(range(len(lengths)))
    assert [i for bead in beads for i in range(bead.other_first, bead.other_end)] == list(range(len(other)))


def test_deviation_is_in_standard_deviations():
    assert deviation(100, 100) == deviation(0, 0) == 0
    assert deviation(100, 126) == pytest.approx(26 / (6.8 * 113) ** 0.5)
