"""PDF files for tests, made of lines of text."""

from collections.abc import Sequence

# Of a file that needs a password: the keys fit none.
_ENCRYPT = "<</Filter/Standard/V 1/R 2/Length 40/P -4/O<" + "12" * 32 + ">/U<" + "34" * 32 + ">>>"


def make_pdf(
    pages: Sequence[Sequence[str]],
    *,
    outline: Sequence[tuple[str, int]] = (),
    needs_password: bool = False,
) -> bytes:
    """A PDF file with a page for each list of lines, and (title, page from 0) in its outline."""
    first = 4  # behind catalog, pages and font
    kids = " ".join(f"{first + 2 * number} 0 R" for number in range(len(pages)))
    entries = first + 2 * len(pages)  # the outline, and what is in it
    objects = [
        "<</Type/Catalog/Pages 2 0 R" + (f"/Outlines {entries} 0 R>>" if outline else ">>"),
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for number, lines in enumerate(pages):
        shown = "".join(f"({_escaped(line)})Tj T*\n" for line in lines)
        content = f"BT /F1 12 Tf 14 TL 72 720 Td\n{shown}ET"
        objects += [
            "<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>"
            f"/Contents {first + 2 * number + 1} 0 R>>",
            f"<</Length {len(content)}>>stream\n{content}\nendstream",
        ]
    if outline:
        last = entries + len(outline)
        objects.append(f"<</First {entries + 1} 0 R/Last {last} 0 R/Count {len(outline)}>>")
    for number, (title, page) in enumerate(outline, start=entries + 1):
        after = f"/Next {number + 1} 0 R" if number < last else ""
        objects.append(
            f"<</Title({_escaped(title)})/Parent {entries} 0 R{after}"
            f"/Dest[{first + 2 * page} 0 R/Fit]>>"
        )
    return _file(objects, needs_password)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")


def _file(objects: Sequence[str], needs_password: bool) -> bytes:
    content, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, start=1):
        places.append(len(content))
        content += f"{number} 0 obj{text}endobj\n".encode("latin-1")
    start = len(content)
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    encrypt = f"/Encrypt{_ENCRYPT}/ID[<00><00>]" if needs_password else ""
    end = (
        f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
        f"trailer<</Size {len(objects) + 1}/Root 1 0 R{encrypt}>>\nstartxref\n{start}\n%%EOF"
    )
    return content + end.encode("latin-1")
