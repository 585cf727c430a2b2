"""The style sheet of a report: light and dark, phone and print, colours that all can tell apart."""

# Series colours are those of Okabe and Ito, darkened or lightened to be legible on each
# background; "better" is blue and "worse" is orange, and each also has a symbol.
STYLE = """
:root{--page:#f6f7f9;--card:#fff;--ink:#1b1f24;--soft:#59626d;--line:#dfe3e8;--fill:#eef1f5;
--accent:#0b5cad;--better:#0b5cad;--worse:#b34700;--gold:#8a5a00;--gold-fill:#fff4d6;
--mark:#ffe28a;--mark-ink:#1b1f24;--s0:#0b5cad;--s1:#b34700;--s2:#00785a;--s3:#9b3a83;--s4:#59626d;
--s5:#8a5a00}
@media (prefers-color-scheme:dark){:root{--page:#101418;--card:#181d23;--ink:#e7eaee;
--soft:#a3adb8;--line:#2e363f;--fill:#222931;--accent:#7db8f5;--better:#7db8f5;--worse:#ffa264;
--gold:#f2c14e;--gold-fill:#33290f;--mark:#6b5310;--mark-ink:#fff3cf;--s0:#7db8f5;--s1:#ffa264;
--s2:#4fd1a8;--s3:#e39bd0;--s4:#a3adb8;--s5:#f2c14e}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",Helvetica,Arial,sans-serif}
header,main,footer{max-width:1120px;margin:0 auto;padding:0 16px}
header{padding-top:28px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:1.25rem;line-height:1.3;margin:0 0 4px}
h3{font-size:1.02rem;margin:22px 0 8px}
h4{font-size:.92rem;margin:0 0 6px;color:var(--soft)}
p{margin:6px 0}
a{color:var(--accent)}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:2px solid var(--accent);
outline-offset:2px}
.soft,.lead{color:var(--soft)}
.lead{margin:0 0 12px;max-width:75ch}
.facts{display:flex;flex-wrap:wrap;gap:4px 20px;margin:8px 0 14px;padding:0;list-style:none;
color:var(--soft);font-size:.92rem}
.facts b{color:var(--ink);font-weight:600}
nav ul{display:flex;flex-wrap:wrap;gap:2px 16px;padding:0;margin:12px 0 20px;list-style:none;
font-size:.92rem}
.verdict{background:var(--card);border:1px solid var(--line);border-left:5px solid var(--soft);
border-radius:8px;padding:12px 16px;font-size:1.06rem;margin:0 0 14px}
.verdict.better{border-left-color:var(--better)}
.verdict.worse{border-left-color:var(--worse)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;padding:0;
margin:0 0 8px;list-style:none}
.tiles li{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 14px}
.tiles b{display:block;white-space:nowrap;font-size:1.45rem;line-height:1.25;
font-variant-numeric:tabular-nums}
.tiles li>span{display:block;font-size:.85rem;color:var(--soft)}
.tiles .state{display:block}
main>section{background:var(--card);border:1px solid var(--line);border-radius:10px;
padding:18px 18px 20px;margin:0 0 18px}
.scroll{overflow-x:auto;max-width:100%;margin:8px 0}
table{border-collapse:separate;border-spacing:0;font-size:.9rem;font-variant-numeric:tabular-nums;
overflow-wrap:normal}
.caption{color:var(--soft);font-size:.85rem;margin:8px 0 0;max-width:90ch}
th,td{text-align:left;padding:6px 14px 6px 0;border-bottom:1px solid var(--line);
vertical-align:top}
thead th{color:var(--soft);font-weight:600;white-space:nowrap;vertical-align:bottom}
tbody th{font-weight:600}
.results td,.differences td{white-space:nowrap}
.results tbody th,.differences tbody th{position:sticky;left:0;background:var(--card);z-index:1;
max-width:38vw}
.results small,.differences small{display:block;color:var(--soft);font-size:.8rem;font-weight:400}
.best b::after{content:" \\2605";color:var(--gold);font-size:.8em}
.better{color:var(--better)}
.worse{color:var(--worse)}
.tiles li.better,.tiles li.worse,.tiles li.undecided,.tiles li.same,
.verdict.better,.verdict.worse{color:inherit}
.same{color:var(--soft)}
.state{font-weight:600;white-space:nowrap}
.undecided{color:var(--soft)}
.options td,.options th{max-width:60vw;white-space:normal;overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:16px}
figure{margin:0;min-width:0}
figcaption{font-size:.9rem;margin-bottom:2px}
figcaption .soft{font-size:.82rem}
.legend{display:flex;flex-wrap:wrap;gap:0 14px;list-style:none;margin:2px 0;padding:0;
font-size:.82rem}
.legend svg{width:26px;height:8px;margin-right:5px;vertical-align:middle}
svg{display:block}
.chart svg.plot{width:100%;height:auto;max-width:480px}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",Arial,sans-serif;
fill:var(--soft)}
.legend svg,.inline svg{display:inline-block}
.grid{stroke:var(--line);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1}
.stage{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}
.curve{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.raw{fill:none;stroke-width:1;opacity:.35}
.l0{stroke:var(--s0)}.l1{stroke:var(--s1)}.l2{stroke:var(--s2)}.l3{stroke:var(--s3)}
.l4{stroke:var(--s4)}.l5{stroke:var(--s5)}
.l1.curve{stroke-dasharray:7 4}.l2.curve{stroke-dasharray:2 4}.l3.curve{stroke-dasharray:9 3 2 3}
.l4.curve{stroke-dasharray:4 3}.l5.curve{stroke-dasharray:12 4}
.f0{fill:var(--s0)}.f1{fill:var(--s1)}.f2{fill:var(--s2)}.f3{fill:var(--s3)}.f4{fill:var(--s4)}
.f5{fill:var(--s5)}
.track{fill:var(--fill)}
.whisker{stroke:currentColor;stroke-width:2}
.point{fill:currentColor}
.diagonal{stroke:var(--soft);stroke-dasharray:3 4}
details{border:1px solid var(--line);border-radius:8px;margin:8px 0;padding:0 14px}
details[open]{padding-bottom:12px}
summary{cursor:pointer;padding:9px 0;font-weight:600}
.chip{display:inline-block;font-weight:400;font-size:.82rem;border:1px solid var(--line);
border-radius:99px;padding:0 9px;margin:2px 0 0 6px;white-space:nowrap}
.answers{display:grid;grid-template-columns:max-content 1fr;gap:2px 12px;margin:4px 0 12px;
font-size:.94rem}
.answers dt{color:var(--soft)}
.answers dd{margin:0;min-width:0}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,300px),1fr));gap:14px}
.columns>section{min-width:0}
ol.passages{list-style:none;margin:0;padding:0}
.passage{border:1px solid var(--line);border-radius:7px;padding:7px 11px;margin:0 0 7px;
font-size:.88rem;line-height:1.45}
.passage.gold{border-color:var(--gold);background:var(--gold-fill)}
.passage p{margin:2px 0 0}
.rank{font-weight:700;margin-right:.5em;font-variant-numeric:tabular-nums}
.score{color:var(--soft);white-space:nowrap;font-variant-numeric:tabular-nums}
.badge{color:var(--gold);font-weight:600;white-space:nowrap;margin-right:.7em}
.title{font-weight:600;margin-right:.7em}
sub{font-size:.72em;line-height:0}
mark{background:var(--mark);color:var(--mark-ink);border-radius:3px;padding:0 2px}
.views{width:100%;table-layout:fixed;font-size:.85rem}
.views td{border:0;padding:0 8px 4px 0}
.views tbody th{border:0;border-top:1px solid var(--line);padding:7px 0 1px;font-weight:400;
overflow-wrap:anywhere}
.views thead th{white-space:normal;border:0;padding-bottom:2px}
.views svg{width:100%;height:9px;margin-top:2px}
.boxes{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:14px}
.box{border:1px solid var(--line);border-radius:8px;padding:12px 14px;min-width:0}
.box h3{margin:0 0 6px}
.box>p{font-size:.9rem;margin:0 0 8px}
.problems{border:1px solid var(--worse);border-radius:8px;padding:8px 14px;background:var(--card)}
footer{padding-bottom:36px;color:var(--soft);font-size:.85rem}
@media (max-width:560px){main>section{padding:14px 12px 16px;border-radius:8px}
header,main,footer{padding-left:10px;padding-right:10px}h1{font-size:1.4rem}
.answers{grid-template-columns:1fr}.answers dd{margin-bottom:5px}details{padding:0 10px}
.chip{margin-left:4px;margin-right:2px}.tiles b{font-size:1.22rem}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--fill:#eee;
--accent:#0b5cad;--better:#0b5cad;--worse:#b34700;--gold:#8a5a00;--gold-fill:#fff;--mark:#ffe28a;
--mark-ink:#000;--s0:#0b5cad;--s1:#b34700;--s2:#00785a;--s3:#9b3a83;--s4:#59626d;--s5:#8a5a00}
body{font-size:10.5pt}nav{display:none}main>section{border:0;padding:0 0 8px}
.scroll{overflow:visible}figure,.passage,.box,tr{break-inside:avoid}h2,h3,h4{break-after:avoid}
details::details-content{content-visibility:visible;height:auto}}
"""
