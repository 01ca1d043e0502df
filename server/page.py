"""The template of every page. In a module, since an app bundle of Flower carries no `.j2`."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ page.title }}</title>
<style>
:root {
  --page: #f7f7f5; --card: #ffffff; --text: #1d2126; --muted: #676d76; --rule: #e2e4e0;
  --accent: #0a6b6b; --series-2: #b9541a; --series-3: #5b53a8;
  --series-4: #2f7d3b; --series-5: #a3386c; --series-6: #7a7f87;
  --tint: #eef5f4; --warn: #8a4b00; --warn-tint: #fdf3e2; --warn-rule: #ecc98e;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --page: #131517; --card: #1b1e21; --text: #e9eaec; --muted: #9ba1aa; --rule: #31363b;
    --accent: #58bdb4; --series-2: #e8935c; --series-3: #a9a2ee;
    --series-4: #7cc487; --series-5: #e58bb4; --series-6: #8f959d;
    --tint: #1a2928; --warn: #f3c076; --warn-tint: #2c2417; --warn-rule: #5d4a27;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1160px; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; font-weight: 620; margin: 2.5rem 0 .8rem; }
.subtitle { color: var(--muted); margin: .4rem 0 0; }
.figures { display: grid; gap: 1rem; margin: 2rem 0 1.25rem; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 1.1rem 1.25rem; min-width: 0; }
.figures dt, .name { color: var(--muted); font-size: .875rem; }
.value { font-size: 2.3rem; line-height: 1.2; font-weight: 620; letter-spacing: -.02em; font-variant-numeric: tabular-nums; margin: .15rem 0 .35rem; }
.note { color: var(--muted); font-size: .84rem; line-height: 1.35; margin: .3rem 0 0; overflow-wrap: anywhere; display: flex; gap: .8rem; justify-content: space-between; }
.note b { font-weight: 500; color: var(--text); font-variant-numeric: tabular-nums; white-space: nowrap; }
.warning { background: var(--warn-tint); border-color: var(--warn-rule); }
.warning .value { color: var(--warn); font-size: 1.9rem; line-height: 1.45; }
.statement { margin: 1.25rem 0 1rem; background: var(--tint); border-left: 3px solid var(--accent); border-radius: 0 10px 10px 0; padding: .9rem 1.25rem; }
.statement.warning { background: var(--warn-tint); border-color: var(--warn); }
.statement p { margin: .25rem 0; max-width: 75ch; overflow-wrap: anywhere; }
.plots { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); }
@media (min-width: 760px), print { .plots { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.plots.of1 { grid-template-columns: minmax(0, 1fr); }
@media (min-width: 1040px) {
  .plots.of3 { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .plots.of5 { grid-template-columns: repeat(6, minmax(0, 1fr)); }
  .of5 figure { grid-column: span 3; }
  .of5 figure:nth-child(n+3) { grid-column: span 2; }
}
figure { margin: 0; break-inside: avoid; }
figcaption { font-weight: 620; font-size: .95rem; margin-bottom: .5rem; }
svg { display: block; width: 100%; height: auto; margin: 0 auto; font-family: inherit; }
.table { overflow: auto; max-height: 40rem; padding: 0; margin-top: 1rem; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .9rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); background: var(--card); }
tbody tr:last-child td { border-bottom: 0; }
thead th { position: sticky; top: 0; z-index: 1; color: var(--muted); font-weight: 500; font-size: .82rem; white-space: nowrap; }
td:first-child { min-width: 7.5rem; max-width: 16rem; overflow-wrap: anywhere; }
td.number:first-child { min-width: 0; }
.number { text-align: right; white-space: nowrap; }
.total td { font-weight: 620; background: var(--tint); }
details { margin-top: 2.5rem; }
summary { cursor: pointer; font-weight: 620; }
pre { overflow: auto; font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 600px) {
  main { padding: 1.5rem 1rem 2.5rem; }
  .figures { grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: .75rem; margin-top: 1.25rem; }
  .card { padding: .9rem 1rem; }
  .card.table { padding: 0; }
  th:first-child, td:first-child { position: sticky; left: 0; max-width: 8rem; }
  thead th:first-child { z-index: 2; }
}
@media print {
  body { font-size: 12px; background: none; }
  main { max-width: none; padding: 0; }
  .table { overflow: visible; max-height: none; }
  thead th { position: static; }
  tr, .card { break-inside: avoid; }
  .card.table { break-inside: auto; }
}
</style>
</head>
<body>
<main>
<h1>{{ page.title }}</h1>
{% if page.subtitle %}
<p class="subtitle">{{ page.subtitle }}</p>
{% endif %}
{% if page.figures %}
<div class="figures">
{% for figure in page.figures %}
<div class="card{{ " warning" if figure.warning }}">
<div class="name">{{ figure.name }}</div>
<div class="value">{{ figure.value }}</div>
{% for note in figure.notes %}
<p class="note"><span>{{ note[0] }}</span>{% if note[1] %} <b>{{ note[1] }}</b>{% endif %}</p>
{% endfor %}
</div>
{% endfor %}
</div>
{% endif %}
{% if page.statement %}
<div class="statement{{ " warning" if page.warning }}">
{% for sentence in page.statement %}
<p>{{ sentence }}</p>
{% endfor %}
</div>
{% endif %}
{% if page.plots %}
<div class="plots of{{ page.plots | length }}">
{% for name, picture in page.plots %}
<figure class="card">
<figcaption>{{ name }}</figcaption>
{{ picture | safe }}
</figure>
{% endfor %}
</div>
{% endif %}
{% for table in page.tables %}
{% if table.title %}
<h2>{{ table.title }}</h2>
{% endif %}
{% if table.rows %}
{% set numeric = table.numeric() %}
<div class="card table" tabindex="0" role="region" aria-label="{{ table.title or page.title }}">
<table>
<thead><tr>
{% for column in table.columns %}
<th scope="col"{% if numeric[loop.index0] %} class="number"{% endif %}>{{ column }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr{% if loop.first and table.first_is_total %} class="total"{% endif %}>
{% for value in row %}
<td{% if numeric[loop.index0] %} class="number"{% endif %}>{{ value | cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% else %}
<p class="subtitle">{{ table.if_empty }}</p>
{% endif %}
{% endfor %}
{% if page.config %}
<details>
<summary>Configuration</summary>
<pre class="card">{{ page.config }}</pre>
</details>
{% endif %}
</main>
</body>
</html>
"""
