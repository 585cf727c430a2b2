"""The page to ask in: one document that needs nothing but this server.

What comes from a corpus, a question or a model becomes text of a node, never HTML; the
Content-Security-Policy allows this script and this style sheet by their hashes and nothing else.
"""

import base64
import hashlib

from ragjax.evaluation.report.style import STYLE

_STYLE = (
    STYLE
    + """
form{display:flex;gap:10px;margin:0 0 14px}
input,button{font:inherit;color:inherit;border:1px solid var(--soft);border-radius:8px;
padding:10px 14px;background:var(--card)}
input{flex:1;min-width:0}
button{background:var(--accent);border-color:var(--accent);color:var(--page);font-weight:600;
cursor:pointer}
button:disabled{opacity:.55;cursor:progress}
input:focus-visible,button:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
#notes{margin-top:12px}
[hidden]{display:none!important}
.text{font-size:1.2rem;margin:0 0 10px;white-space:pre-wrap}
.passage p{white-space:pre-wrap}
.passage header{padding:0}
.passage .score{display:block;white-space:normal}
"""
)
_SCRIPT = """
"use strict";
const at = id => document.getElementById(id);

function put(parent, tag, name, text) {
  const made = document.createElement(tag);
  made.className = name;
  made.dir = "auto";
  made.textContent = text;
  parent.append(made);
  return made;
}

// Text with the words that carry the answer marked; offsets count code points.
function marked(parent, text, span) {
  if (!span) { parent.textContent = text; return; }
  const points = Array.from(text), part = (a, b) => points.slice(a, b).join("");
  parent.textContent = part(0, span.start);
  put(parent, "mark", "", part(span.start, span.end));
  parent.append(part(span.end));
}

// A corpus may hold half of a pair of surrogates, which is no character.
const wellFormed = (key, value) => typeof value === "string" ? value.toWellFormed() : value;
const share = value => value === null ? "n/a" : value.toFixed(2);
const nats = value => value === null ? "n/a" : (value > 0 ? "+" : "") + value.toFixed(2) + " nats";

function show(reply) {
  at("text").textContent = reply.answer || "(nothing)";
  at("verdict").textContent = reply.verdict;
  at("verdict").className = "verdict " + (reply.grounded ? "better" : "worse");
  at("verdict").hidden = false;
  for (const note of reply.notes) put(at("notes"), "p", "soft", "Note: " + note);
  reply.documents.forEach((source, place) => {
    const best = source.id === reply.relied_on, span = best ? reply.span : null;
    const box = put(at("passages"), "li", best ? "passage gold" : "passage", "");
    const head = put(box, "div", "", "");
    put(head, "span", "rank", `${place + 1}.`);
    if (best) put(head, "span", "badge", "the answer relies on this one");
    if (source.title) {
      const title = put(head, "span", "title", "");
      marked(title, source.title, span && span.field === "title" ? span : null);
    }
    put(head, "span", "soft", source.id);
    put(head, "span", "score", `retriever ${share(source.p_r)}, posterior ${
      share(source.posterior)}; without it the answer's log-prob changes by ${
      nats(source.left_out_change)}`);
    marked(put(box, "p", "", ""), source.text, span && span.field === "text" ? span : null);
  });
  const [answered, explained] = [reply.answer_seconds, reply.seconds].map(s => s.toFixed(1) + " s");
  put(at("notes"), "p", "soft",
    `Answered in ${answered}, explained after ${explained}; generation ${reply.generation}.`);
}

function fail(message) {
  at("problem").textContent = message;
  at("problem").hidden = false;
}

async function ask(question) {
  for (const id of ["text", "notes", "passages"]) at(id).replaceChildren();
  for (const id of ["verdict", "problem"]) at(id).hidden = true;
  at("result").hidden = false;
  at("result").setAttribute("aria-busy", "true");
  at("go").disabled = true;
  at("text").textContent = "\\u2026";
  try {
    const response = await fetch("ask", {
      method: "POST",
      headers: {"content-type": "application/json"},
      body: JSON.stringify({question, stream: true}),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", text = "", whole = false;
    for (;;) {
      const {done, value} = await reader.read();
      if (done) break;
      const events = (rest + value).split("\\n\\n");
      rest = events.pop();
      for (const event of events) {
        const data = JSON.parse(event.slice("data: ".length), wellFormed);
        if (data.error) throw new Error(data.error.message);
        if (data.text) at("text").textContent = text += data.text;
        if (data.reply) { show(data.reply); whole = true; }
      }
    }
    if (!whole) throw new Error("the answer broke off; ask again");
  } catch (error) {
    if (at("text").textContent === "\\u2026") at("text").textContent = "";
    fail(error.message);
  } finally {
    at("result").setAttribute("aria-busy", "false");
    at("go").disabled = false;
  }
}

at("form").addEventListener("submit", event => {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!question || at("go").disabled) return;
  history.replaceState(null, "", "?q=" + encodeURIComponent(question));
  ask(question);
});

fetch("health").then(async response => {
  const found = await response.json();
  at("about").textContent = response.ok
    ? `${found.documents.toLocaleString("en")} documents, generation ${found.generation}`
    : found.error.message;
}).catch(() => { at("about").textContent = "the server does not answer"; });

const given = new URLSearchParams(location.search).get("q");
if (given && given.trim()) { at("question").value = given; ask(given.trim()); }
"""


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>Ask the documents</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>Ask the documents</h1>
<p id="about" class="soft">&hellip;</p>
</header>
<main>
<noscript><p class="problems">This page needs JavaScript.</p></noscript>
<form id="form">
<input id="question" name="q" aria-label="Question" placeholder="Your question" autocomplete="off"
dir="auto" maxlength="2000" required autofocus>
<button id="go">Ask</button>
</form>
<p id="problem" class="problems" role="alert" hidden></p>
<section id="result" aria-live="polite" aria-busy="false" hidden>
<p id="text" class="text" dir="auto"></p>
<p id="verdict" class="verdict" hidden></p>
<ol id="passages" class="passages"></ol>
<div id="notes"></div>
</section>
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""
