import pytest

from ragjax.index.words import language_of

TEXTS = {
    "english": "The virus is spread by droplets, and it was found in the air of the room.",
    "german": "Der Hund und die Katze sind nicht im Haus, aber sie kommen mit dem Zug.",
    "french": "Le chat est dans la maison et les chiens ne sont pas sur la route du village.",
    "russian": "Это не то, что я хотел, но он был с нами и на работе.",
    "chinese": "新冠病毒通过空气传播,平均潜伏期约为五天。",
    "japanese": "この研究では、ウイルスの感染経路について調べた。",
    "korean": "바이러스는 공기를 통해 전파될 수 있다.",
    "southeast asian": "ไวรัสแพร่กระจายทางอากาศ",
    "": "",
}


@pytest.mark.parametrize(("language", "text"), TEXTS.items())
def test_a_sentence_tells_its_language(language, text):
    assert language_of(text) == language


def test_letters_of_other_words_tell_nothing():
    assert language_of("Ærøskøbing Tromsø Malmö") == ""
    assert language_of("def main(argv): return 0") == "english"
