import pytest

from ragjax.data.documents.html import read_html
from ragjax.data.documents.sections import UnreadableError

pytest.importorskip("lxml", reason="needs the [documents] extra")


@pytest.fixture
def read(tmp_path):
    def read(page):
        path = tmp_path / "a.html"
        path.write_bytes(page if isinstance(page, bytes) else page.encode("utf-8"))
        return [(" / ".join(s.headings), s.paragraphs) for s in read_html(path).sections]

    return read


PAGES = {
    "headings and paragraphs": (
        "<title>Pump - Shop</title><h1>Pump</h1><p>It <b>pum</b>ps.</p>Loose <i>te</i>xt<br>"
        "<h2>Care</h2><ul><li>Dust it.<li>Oil it.</ul><h2>Price</h2>",
        [
            ("Pump", ["It pumps.", "Loose text"]),
            ("Pump / Care", ["Dust it.", "Oil it."]),
            ("Pump / Price", ["Price"]),
        ],
    ),
    "the title where there is no h1": (
        "<title>Pump\n 2</title><p>It pumps.<h2>Care</h2>Dust it.",
        [("Pump 2", ["It pumps."]), ("Pump 2 / Care", ["Dust it."])],
    ),
    "scripts, hidden texts and controls": (
        "<style>p {}</style><script>var p = '<p>no</p>'</script><p>Yes<!-- no -->.<p hidden>no"
        "<p aria-hidden=true>no</p><noscript>no</noscript><template>no</template><form>Your name"
        "<button>no</button><select><option>no</select><textarea>no</textarea></form>",
        [("", ["Yes.", "Your name"])],
    ),
    "landmarks": (
        "<header>Shop</header><nav><a href=a>Home</a></nav><div role=banner>Sale</div>"
        "<aside>Ads</aside><p>Text.</p><footer>Imprint</footer>",
        [("", ["Text."])],
    ),
    "a header with the heading": (
        "<header><h1>Pump</h1>since 1990</header>Text.",
        [("Pump", ["since 1990", "Text."])],
    ),
    "main alone": (
        "<p>Menu</p><main><aside>Beware.</aside><p>Text.</main>After",
        [("", ["Beware.", "Text."])],
    ),
    "an article alone": ("<p>Menu</p><article>Text.</article>", [("", ["Text."])]),
    "several articles": (
        "<article>One.</article><article>Two.</article>",
        [("", ["One.", "Two."])],
    ),
    "a main that a script fills": ("<main></main><p>Text.", [("", ["Text."])]),
    "a menu without a name": (
        "<ul>" + "<li><a href=x>Home</a>" * 4 + "</ul><p>Text with <a href=x>links</a>.",
        [("", ["Text with links."])],
    ),
    "links and nothing else": (
        "<ul>" + "".join(f"<li><a href=x>Part {n}</a>" for n in range(4)) + "</ul>",
        [("", [f"Part {n}" for n in range(4)])],
    ),
    "a table": (
        "<table><tr><th>Kind<th>kg<tr><td>Pump<td>5<tr><td><p>Fan</p><td></table>",
        [("", ["Kind | kg", "Pump | 5", "Fan"])],
    ),
    "anchors of headings": (
        "<h1>Pump <a href='#pump'>\u00b6</a></h1><h2>C#</h2>x",
        [("Pump / C#", ["x"])],
    ),
    "code": ("<pre><code>a = 1\n  b</code></pre>", [("", ["a = 1 b"])]),
    "broken markup": (
        "<p>One<b>two<p>three</b></div></p></td><h2>Care</h3><p>& &lt; &nope; &#0; &#x110000;",
        [("", ["Onetwo", "three"]), ("Care", ["& < &nope; \ufffd \ufffd"])],
    ),
    "nothing": ("", []),
    "no text": ("<html><body><img src=a.png></body></html>", []),
    "no markup": ("Plain text.", [("", ["Plain text."])]),
}


@pytest.mark.parametrize("name", PAGES)
def test_text_stands_under_its_headings(read, name):
    page, expected = PAGES[name]
    assert read(page) == expected


GREEK = "\u03b1\u03bd\u03c4\u03bb\u03af\u03b1"


@pytest.mark.parametrize(
    "page",
    [
        f"<p>{GREEK}".encode(),
        f"<p>{GREEK}".encode("utf-8-sig"),
        f"<p>{GREEK}".encode("utf-16"),
        f"<meta charset=utf-16><p>{GREEK}".encode(),
        f"<meta charset='windows-1253'><p>{GREEK}".encode("cp1253"),
        f'<META content="text/html; Charset=ISO-8859-7"><p>{GREEK}'.encode("iso-8859-7"),
        f'<?xml version="1.0" encoding="iso-8859-7"?><p>{GREEK}'.encode("iso-8859-7"),
    ],
)
def test_an_encoding_is_declared_or_utf8(read, page):
    assert read(page) == [("", [GREEK])]


def test_latin1_means_windows_1252_as_in_browsers(read):
    assert read(b"<meta charset=iso-8859-1>5 \x80") == [("", ["5 \u20ac"])]


@pytest.mark.parametrize(
    "page",
    [b"caf\xe9", b"<meta charset=klingon>caf\xe9", "<p>a".encode("utf-16-le"), b"<p>\x00\xff"],
)
def test_an_unknown_encoding_is_not_guessed(read, page):
    with pytest.raises(UnreadableError, match="not UTF-8 and do not declare a known encoding"):
        read(page)


def test_elements_may_be_nested_without_end(read):
    assert read("<div>" * 1_000 + "deep" + "</div>" * 1_000) == [("", ["deep"])]
    read("<div>" * 100_000 + "deep")  # deeper than is read
