"""The page in a headless browser, on the real application before a service without models."""

import asyncio
import html
import re
import shutil
import subprocess
import threading
import types
import urllib.request

import pytest

pytest.importorskip("uvicorn", reason="needs the [serve] extra")
import uvicorn

from ragjax.runs.ask.asker import Reply, Source
from ragjax.runs.ask.spans import Span
from ragjax.runs.serve.app import listen, make_app
from ragjax.runs.serve.batches import Overloaded, ServeLimits
from ragjax.runs.serve.service import Explained, Told

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium"
)
# What a corpus may hold that a page must survive.
HOSTILE = (
    "</p></script><script>document.title='broken'</script><img src=x onerror=alert(1)>"
    " \x07 \ud800 " + "W" * 300 + " العربية مرحبا 漢字かな 👩🏽‍🔬"
)
TEXT = f"👩🏽‍🔬 the red cat likes fish {HOSTILE}"
START = TEXT.index("fish")
SOURCES = (
    Source("red-cat", "the cat", TEXT, 0.7, 0.91, 1.25, -2.0),
    Source("<b>owl</b>", HOSTILE, "the owl likes mice", 0.3, 0.09, -0.01, -4.0),
)
REPLY = Reply(
    question="what does the red cat like?", answer=f"fish {HOSTILE}", log_prob=-2.1, num_tokens=4,
    no_doc_log_prob=-6.0, utility=3.9, grounded=True, sources=SOURCES, relied_on=0,
    span=Span("text", START, START + 4, "match", 1.0, None), notes=(f"cut {HOSTILE}",),
    answer_seconds=0.4, seconds=1.2,
)  # fmt: skip


class Answers:
    """A service that answers the same at once, or refuses."""

    limits = ServeLimits()
    opened = types.SimpleNamespace(
        name="index/1",
        asker=types.SimpleNamespace(system=types.SimpleNamespace(size=1234)),
    )

    async def start(self):
        """Has nothing to open."""

    async def stop(self):
        """Has nothing to end."""

    def waiting(self):
        return {"texts": 0, "answers": 0}

    def ask(self, ask):
        if ask.question == "full":
            raise Overloaded
        future = asyncio.get_running_loop().create_future()
        if ask.question == "broken":
            future.set_exception(RuntimeError("/secret"))
            return future
        for end in range(0, len(REPLY.answer), 7):
            ask.heard(REPLY.answer[:end])
        future.set_result(Told("index/1", Explained(REPLY, 99, True)))
        return future


@pytest.fixture(scope="module")
def url():
    with listen("127.0.0.1", 0) as listening:
        config = uvicorn.Config(make_app(Answers()), log_config=None, log_level="critical")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def browse(tmp_path, url, *flags):
    """Runs headless Chromium on a page; returns what it printed on stdout and on its console."""
    result = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--enable-logging=stderr", "--hide-scrollbars", "--virtual-time-budget=10000",
            f"--user-data-dir={tmp_path / 'profile'}", *flags, url,
        ],
        capture_output=True, timeout=300, check=True,
    )  # fmt: skip
    logged = result.stderr.decode("utf-8", "replace").splitlines()
    return result.stdout.decode("utf-8"), [line for line in logged if "CONSOLE" in line]


def shown(markup):
    """The text of markup."""
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def test_the_page_loads_nothing_from_elsewhere(url):
    with urllib.request.urlopen(url + "/") as response:
        text, policy = response.read().decode(), response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"(?:src|href)=\"?(?:https?:)?//", text)
    assert text.count("<script>") == text.count("<style>") == 1
    assert "innerHTML" not in text and "eval(" not in text


@needs_chromium
@pytest.mark.slow
def test_a_browser_shows_an_answer_and_its_sources_as_text(url, tmp_path):
    printed, console = browse(tmp_path, f"{url}/?q=what+likes+fish", "--dump-dom")
    assert console == []
    body = printed[printed.index("<main>") : printed.index("<script>", printed.index("<main>"))]
    assert "<title>Ask the documents</title>" in printed and "<img" not in body
    assert "1,234 documents, generation index/1" in printed
    assert "The answer rests on the documents (+3.90 nats" in body
    assert shown(re.search(r'<p id="text".*?</p>', body, re.DOTALL)[0]).startswith("fish </p>")
    first, second = re.findall(r'<li class="passage.*?</li>', body, re.DOTALL)
    assert "the answer relies on this one" in first and "relies" not in second
    assert re.search(r"<mark[^>]*>fish</mark>", first)  # offsets are of characters, not of UTF-16
    assert "retriever 0.70, posterior 0.91" in first and "-1.25 nats" in first
    assert "<script>document.title='broken'</script><img src=x onerror" in shown(first)
    assert "<b>owl</b>" in shown(second)
    assert "Note: cut </p>" in shown(body) and "Answered in 0.4 s" in body
    assert 'aria-busy="false"' in body and "value" not in body.split("<input")[0]


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "words"), [("full", "too many requests wait"), ("broken", "the server failed")]
)
def test_a_browser_says_what_went_wrong(url, tmp_path, question, words):
    printed, _ = browse(tmp_path, f"{url}/?q={question}", "--dump-dom")
    alert = re.search(r'<p id="problem"[^>]*>(.*?)</p>', printed)[0]
    assert words in alert and "hidden" not in alert and "secret" not in printed
    assert 'aria-busy="false"' in printed and "<li class" not in printed


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(500, False), (1280, True)])
def test_the_page_fits_narrow_and_wide_in_light_and_dark(url, tmp_path, width, dark):
    shot = tmp_path / "shot.png"
    flags = [f"--screenshot={shot}", f"--window-size={width},1000"]
    flags.append(f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    _, console = browse(tmp_path, f"{url}/?q=what+likes+fish", *flags)
    assert console == [] and shot.stat().st_size > 20_000  # a blank one has a few thousand
