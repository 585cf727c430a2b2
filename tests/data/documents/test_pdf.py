import pytest
from pdf_files import make_pdf

from ragjax.data.documents.pdf import read_pdf
from ragjax.data.documents.sections import UnreadableError

pytest.importorskip("pypdfium2", reason="needs the [documents] extra")


@pytest.fixture
def read(tmp_path):
    def read(pages, **options):
        path = tmp_path / "a.pdf"
        path.write_bytes(pages if isinstance(pages, bytes) else make_pdf(pages, **options))
        return read_pdf(path)

    return read


def test_each_page_is_a_section_with_its_number(read):
    found = read([["The pump (blue)", "weighs 5 kg."], [], ["It has a fan."]])
    assert found == ([((), ["The pump (blue) weighs 5 kg."], 1), ((), ["It has a fan."], 3)], [])


def test_the_outline_gives_headings_where_its_titles_stand(read):
    pages = [
        ["Pump", "It pumps."],
        ["More of it.", "2 How to", "clean it", "Dust it."],
        ["Then wait.", "The end."],
    ]
    outline = [("1 Pump", 0), ("How to clean it", 1), ("Elsewhere named", 2)]
    found = read(pages, outline=outline)
    assert [(s.headings, s.paragraphs, s.page) for s in found.sections] == [
        (("1 Pump",), ["It pumps."], 1),
        (("1 Pump",), ["More of it."], 2),
        (("How to clean it",), ["Dust it."], 2),
        (("Elsewhere named",), ["Then wait. The end."], 3),
    ]


def test_an_outline_may_point_nowhere(read):
    found = read([["a"]], outline=[("Nowhere", 9), ("", 0)])
    assert found.sections == [((), ["a"], 1)]


def test_words_that_are_divided_between_lines_are_joined(read):
    lines = ["The manip-", "ulation of well-", "known rules, 5 -", "7 of them"]
    (section,) = read([lines]).sections
    assert section.paragraphs[0].startswith("The manipulation of")
    assert section.paragraphs[0].endswith("rules, 5 - 7 of them")


def test_lines_that_return_on_each_page_are_left_out(read):
    pages = [["Manual of 2024", f"Text {n} of the page", f"Page {n} of 5"] for n in range(1, 6)]
    pages[2][0] = "Manual of 2025"
    pages[4] = ["Page 5 of 5"]
    texts = [section.paragraphs for section in read(pages).sections]
    assert texts == [
        ["Manual of 2024 Text 1 of the page Page 1 of 5"],
        ["Text 2 of the page Page 2 of 5"],
        ["Manual of 2025 Text 3 of the page"],
        ["Text 4 of the page"],
    ]


def test_lines_with_numbers_of_their_own_stay(read):
    pages = [[f"Step {number}", f"{number} turns"] for number in (3, 4, 7, 10, 3)]
    texts = [section.paragraphs[0] for section in read(pages).sections]
    assert texts == [f"Step {number} {number} turns" for number in (3, 4, 7, 10, 3)]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (make_pdf([["secret"]], needs_password=True), "PDF files that need a password"),
        (make_pdf([[], []]), "PDF files without text (scanned: ocrmypdf reads them)"),
        (b"", "broken PDF files"),
        (b"%PDF-1.4\n%%EOF", "broken PDF files"),
        (make_pdf([["text"]])[:60], "broken PDF files"),
    ],
)
def test_a_file_without_text_says_why(read, content, why):
    with pytest.raises(UnreadableError) as error:
        read(content)
    assert str(error.value) == why


def test_a_broken_page_is_named_and_the_others_are_read(read):
    content = make_pdf([["one"], ["two"], ["three"]])
    found = read(
        content.replace(b"/Contents 7 0 R", b"/Contents 7 0 R").replace(
            b"6 0 obj<</Type/Page", b"6 0 obj<</Type/Pigs"
        )
    )
    assert [s.paragraphs for s in found.sections] == [["one"], ["three"]]
    assert found.unread == [2]
