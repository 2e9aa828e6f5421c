"""What a page looks like: light and dark, on a screen of any width, and on paper."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --text: #1d2430; --muted: #5a6472; --line: #d5dae1; --panel: #f5f7f9;
  --helpful: #1b5fa8; --harmful: #b3401f; --good: #1a6e3c; --bad: #a3161b;
  --bad-panel: #fdf0ef; --good-panel: #eef7f1;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #14181e; --text: #e4e8ee; --muted: #a3adba; --line: #38414d; --panel: #1d232b;
    --helpful: #7db8f5; --harmful: #f29a77; --good: #7fd3a0; --bad: #ff9c94;
    --bad-panel: #371d1d; --good-panel: #17281e;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem 1rem 3rem; max-width: 72rem; background: var(--page);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 {
  font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1.1rem; margin: 1.5rem 0 .5rem; }
h4 { font-size: 1rem; margin: .75rem 0 .35rem; }
p { max-width: 46rem; margin: .5rem 0; }
a { color: var(--helpful); }
nav ul {
  display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; margin: 0;
}
.note, footer, figcaption { color: var(--muted); font-size: .9rem; }
.verdict { border-left: .3rem solid; border-radius: .25rem; padding: .5rem 1rem; margin: 1rem 0; }
.verdict h2 { border: 0; margin: .25rem 0; padding: 0; font-size: 1.1rem; }
.verdict ul { margin: .25rem 0; padding-left: 1.2rem; }
.verdict li { margin: .35rem 0; }
.bad { border-color: var(--bad); background: var(--bad-panel); }
.unknown { border-color: var(--muted); background: var(--panel); }
.good { border-color: var(--good); background: var(--good-panel); }
.bad h2, .badge { color: var(--bad); }
.good h2 { color: var(--good); }
.badge {
  border: 1px solid; border-radius: .25rem; padding: 0 .4rem; font-size: .85rem;
  font-weight: 600; display: inline-block; white-space: nowrap;
}
.helpful { color: var(--helpful); }
.harmful { color: var(--harmful); }
dl { margin: .5rem 0; }
dl > div {
  display: grid; grid-template-columns: 12rem minmax(0, 1fr); gap: 0 1rem;
  padding: .3rem 0; border-bottom: 1px solid var(--line);
}
dt { color: var(--muted); }
dd { margin: 0; }
.scroll { overflow: auto; max-height: 32rem; margin: .75rem 0; }
.scroll:focus-visible { outline: 2px solid var(--helpful); }
table {
  border-collapse: separate; border-spacing: 0; font-size: .9rem;
  font-variant-numeric: tabular-nums;
}
figcaption + .scroll { margin-top: .3rem; border: 1px solid var(--line); width: fit-content; }
figcaption + .scroll { max-width: 100%; }
tbody tr:last-child > * { border-bottom: 0; }
th, td {
  padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: normal;
}
thead th {
  background: var(--panel); vertical-align: bottom; position: sticky; top: 0; z-index: 1;
}
tbody tr { background: var(--page); }
tbody th {
  font-weight: 500; white-space: nowrap; background: inherit; position: sticky; left: 0;
}
.numbers td, .numbers thead th:not(:first-child) { text-align: right; }
.numbers td:nth-child(2), .numbers thead th:nth-child(2) { text-align: left; }
td bdi.long, th bdi.long { display: inline-block; min-width: 16rem; }
tbody tr.failed { background: var(--bad-panel); }
tr.test th, tr.test td { font-weight: 600; border-bottom: 2px solid var(--muted); }
pre {
  overflow-x: auto; background: var(--panel); padding: .75rem; font-size: .8rem;
  line-height: 1.4; border-radius: .25rem; overflow-wrap: normal;
}
code { font-size: .9em; }
summary { cursor: pointer; }
figure { margin: 0; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; margin: .75rem 0; }
.pictures figure { flex: 1 1 20rem; max-width: 36rem; min-width: 0; }
.pictures dl { flex: 1 1 20rem; margin: 0; }
picture img { width: 100%; height: auto; display: block; }
.wide picture img { min-width: 40rem; }
article { border-top: 1px solid var(--line); padding: .25rem 0 1rem; }
article > .groups { display: grid; gap: .5rem 2rem; }
article > .groups { grid-template-columns: minmax(0, 1fr); }
.examples {
  display: grid; grid-template-columns: repeat(auto-fill, 5.2rem); gap: .75rem;
  list-style: none; margin: 0; padding: 0;
}
.examples.large { grid-template-columns: repeat(auto-fill, 8rem); }
.examples figcaption { line-height: 1.3; font-size: .8rem; margin-top: .25rem; }
.examples strong { display: block; font-variant-numeric: tabular-nums; }
.examples img { width: 100%; height: auto; display: block; border: 1px solid var(--line); }
img.few-pixels { image-rendering: pixelated; }
.texts { margin: 0; padding-left: 1.2rem; }
.texts li { margin: .5rem 0; }
.texts p { margin: 0; white-space: pre-wrap; }
@media screen and (min-width: 62rem) {
  article > .groups.pictured { grid-template-columns: auto minmax(0, 1fr) minmax(0, 1fr); }
  article > .groups.written { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
  .groups.pictured > :first-child { width: 5.2rem; }
  .groups.pictured > :first-child:has(.large) { width: 8rem; }
}
@media screen and (max-width: 36rem) {
  dl > div { grid-template-columns: minmax(0, 1fr); }
  dl.short > div { grid-template-columns: minmax(0, 1fr) auto; }
  .examples { grid-template-columns: repeat(auto-fill, minmax(3.7rem, 1fr)); gap: .5rem; }
  .examples.large { grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  article, figure, tr { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
  th { position: static !important; }
  .scroll, pre { overflow: visible; max-height: none; }
  pre { white-space: pre-wrap; }
}
"""
