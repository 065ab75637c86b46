"""The pages' HTML and style, as strings: a FAB carries nothing but Python files."""

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --raised: #f4f6f8; --ink: #1b1f24; --soft: #57606a; --edge: #d5dae0;
  --accent: #1f6fbf; --good: #1a7f45; --bad: #c0273d; --warn: #8f5d00; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171c; --raised: #1c2128; --ink: #e3e8ee; --soft: #a3adb8;
  --edge: #363d47; --accent: #6db3f8; --good: #56c98a; --bad: #ff8795; --warn: #e0b050; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 10px; break-after: avoid; }
p { margin: 6px 0; overflow-wrap: anywhere; }
.soft, figcaption, .unit { color: var(--soft); }
.outcome { font-weight: 600; }
.completed { color: var(--good); } .failed { color: var(--bad); } .stopped, .running { color: var(--warn); }
.notice { border-left: 4px solid currentColor; padding: 6px 12px; margin: 12px 0; background: var(--raised); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin: 18px 0; padding: 0; }
.figures div { background: var(--raised); border: 1px solid var(--edge); border-radius: 8px; padding: 8px 12px;
  break-inside: avoid; }
.figures dt { color: var(--soft); font-size: .82rem; }
.figures dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.figures .unit { display: block; font-size: .8rem; font-weight: 400; }
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 28px 32px; align-items: start; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: .9rem; margin-bottom: 6px; }
figcaption b { color: var(--ink); display: block; font-size: 1rem; }
svg { display: block; width: 100%; height: auto; color: var(--ink); }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
svg text { fill: currentColor; font-family: inherit; }
.scroll { overflow-x: auto; border: 1px solid var(--edge); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; vertical-align: top; white-space: nowrap; border-top: 1px solid var(--edge); }
thead th { border-top: 0; white-space: normal; vertical-align: bottom; background: var(--raised); font-weight: 600; }
th:first-child, .text { text-align: left; }
.lines { white-space: pre-wrap; vertical-align: top; min-width: 9rem; max-width: 24rem; overflow-wrap: anywhere; }
tbody th { font-weight: 600; }
.long { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; max-width: 40rem; text-align: left; }
.name { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; max-width: 18rem; text-align: left; }
code { font-family: ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .9em; }
pre { background: var(--raised); border: 1px solid var(--edge); border-radius: 8px; padding: 12px; overflow-x: auto;
  font-size: .9rem; line-height: 1.5; }
.pairs { columns: 21rem; column-gap: 32px; margin: 0; font-size: .86rem; }
.pairs div { display: flex; justify-content: space-between; gap: 12px; border-bottom: 1px solid var(--edge); padding: 2px 0;
  break-inside: avoid; }
.pairs dt { color: var(--soft); flex: none; max-width: 60%; overflow-wrap: anywhere; }
.pairs dd { margin: 0; text-align: right; overflow-wrap: anywhere; min-width: 0; }
@media (max-width: 760px) { .pictures { grid-template-columns: minmax(0, 1fr); } main { padding: 16px 12px 32px; }
  .figures { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media print { :root { color-scheme: light; --ground: #ffffff; --raised: #ffffff; --ink: #000000; --soft: #444444;
  --edge: #bbbbbb; --good: #1a7f45; --bad: #c0273d; --warn: #8f5d00; }
  @page { margin: 14mm; } html { font-size: 68%; } body { font-size: 1rem; }
  main { max-width: none; padding: 0; } h2 { margin-top: 22px; }
  .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px 20px; }
  .scroll, pre { overflow: visible; border: 0; } pre { padding: 0; white-space: pre-wrap; }
  .figures { grid-template-columns: repeat(4, 1fr); } .figures dd { font-size: 1.1rem; }
  th, td { padding: 2px 6px; white-space: normal; } .long, .name { min-width: 0; } thead { display: table-header-group; }
  tr { break-inside: avoid; } .pairs { columns: 2; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
{% block body %}{% endblock %}
</main>
</body>
</html>
"""

MACROS = """
{% macro figure(picture, heading, note, missing) %}
<figure>
<figcaption><b>{{ heading }}</b>{{ note if picture else missing }}</figcaption>
{% if picture %}{{ picture }}{% endif %}
</figure>
{% endmacro %}

{% macro pairs(values) %}
<dl class="pairs">
{% for key, value in values.items() %}
<div><dt>{{ key }}</dt><dd>{{ value if value != "" else "''" }}</dd></div>
{% endfor %}
</dl>
{% endmacro %}
"""

REPORT = """{% extends "page" %}
{% from "macros" import figure, pairs %}
{% block body %}
<header>
<h1>{{ run.name }}</h1>
<p>{{ run.method }}{% if facts.title %} – {{ facts.title }}{% endif %}{% if facts.paper %} ({{ facts.paper }}){% endif %}</p>
<p class="soft">{{ described }}</p>
<p class="outcome {{ outcome_class }}">{{ outcome }}</p>
{% if run.unreadable %}
<p class="notice">{{ run.unreadable }} line(s) of metrics.jsonl cannot be read and are left out.</p>
{% endif %}
</header>
<dl class="figures">
{% for name, value, unit in figures %}
<div><dt>{{ name }}</dt><dd>{{ value }}{% if unit %} <span class="unit">{{ unit }}</span>{% endif %}</dd></div>
{% endfor %}
</dl>

<h2>How it went</h2>
<div class="pictures">
{% for picture in pictures %}{{ figure(*picture) }}{% endfor %}
</div>

{% if samples %}
<h2>Answers</h2>
<p class="soft">To validation rows, each time the likeliest token: {{ scores }}.</p>
<div class="scroll" tabindex="0" role="region" aria-label="answers">
<table>
<thead><tr><th scope="col" class="text">question</th><th scope="col" class="text">expected</th>
<th scope="col" class="text">before the run</th><th scope="col" class="text">after it</th></tr></thead>
<tbody>
{% for sample in samples %}
<tr>{% for name in ("prompt", "expected", "before", "said") %}<td class="text lines">{{ sample[name] }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}

<h2>Loading what was trained</h2>
{% if loading %}
<p>{{ loading }}</p>
{% if snippet %}<pre tabindex="0"><code>{{ snippet }}</code></pre>{% endif %}
{% else %}
<p>Nothing was exported. <code>fedara export {{ run.name }}</code> writes it from the last checkpoint, where there is one.</p>
{% endif %}

<h2>Clients</h2>
<p class="soft">{{ asked }}</p>
{% if clients %}
<div class="scroll" tabindex="0" role="region" aria-label="clients">
<table>
<thead><tr><th scope="col">client</th>{% if devices %}<th scope="col" class="text">device</th>{% endif %}
<th scope="col">examples</th><th scope="col">asked</th><th scope="col">good</th><th scope="col" class="text">dropped</th>
<th scope="col">s per step</th><th scope="col">peak MB</th><th scope="col">MB down</th><th scope="col">MB up</th>
{% if devices %}<th scope="col">modelled s</th>{% endif %}</tr></thead>
<tbody>
{% for client in clients %}
<tr><th scope="row" class="name">{{ client.key }}</th>
{% if devices %}<td class="text">{{ client.device or "–" }}</td>{% endif %}
<td>{{ client.examples | figure(0) }}</td><td>{{ client.asked }}</td><td>{{ client.good }}</td>
<td class="{{ 'long' if client.dropped or client.left_out else 'text' }}">{% for reason, count in client.dropped.items() %}
{{ reason }} × {{ count }}{{ ", " if not loop.last }}{% endfor %}
{% if client.left_out %}{{ "; " if client.dropped }}left out: {{ client.left_out }}{% endif %}
{% if not client.dropped and not client.left_out %}–{% endif %}</td>
<td>{{ client.step | figure(2) }}</td><td>{{ client.memory | figure(0) }}</td>
<td>{{ client.down | figure(2) }}</td><td>{{ client.up | figure(2) }}</td>
{% if devices %}<td>{{ client.modelled | figure(1) }}</td>{% endif %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
{% if drops %}
<h2>Replies that did not count</h2>
<p class="soft">{{ reasons }}</p>
<div class="scroll" tabindex="0" role="region" aria-label="replies that did not count">
<table>
<thead><tr><th scope="col">round</th><th scope="col" class="text">client</th><th scope="col" class="text">reason</th>
<th scope="col" class="text">detail</th></tr></thead>
<tbody>
{% for number, client, reason, detail in drops %}
<tr><th scope="row">{{ number }}</th><td class="name">{{ client }}</td><td class="name">{{ reason }}</td>
<td class="long">{{ detail }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% if more_drops %}<p class="soft">and {{ more_drops }} more in metrics.jsonl</p>{% endif %}
{% endif %}

{% if facts.privacy %}
<h2>Privacy</h2>
{{ pairs(facts.privacy) }}
{% endif %}

<h2>Configuration</h2>
{% if facts.config %}{{ pairs(facts.config) }}{% else %}<p class="soft">federated.json has none.</p>{% endif %}

<h2>Versions and machine</h2>
{{ pairs(provenance) }}
{% endblock %}
"""

COMPARISON = """{% extends "page" %}
{% from "macros" import figure, pairs %}
{% block body %}
<header>
<h1>{{ title }}</h1>
<p class="soft">{{ described }}</p>
</header>
<div class="pictures">
{% for picture in pictures %}{{ figure(*picture) }}{% endfor %}
</div>

{% for table in tables %}
<h2>{{ table.name }}</h2>
{% if table.note %}<p class="soft">{{ table.note }}</p>{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ table.name }}">
<table>
<thead><tr>{% for heading in table.headings %}<th scope="col"{% if loop.index == 2 %} class="text"{% endif %}>{{ heading }}</th>
{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}{% if loop.first %}<th scope="row" class="name">{{ cell }}</th>{% else %}
<td{% if loop.index == 2 %} class="name"{% endif %}>{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}

{% if differences %}
<h2>Settings that differ</h2>
<div class="scroll" tabindex="0" role="region" aria-label="settings that differ">
<table>
<thead><tr><th scope="col">key</th>{% for name in names %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for key, values in differences.items() %}
<tr><th scope="row">{{ key }}</th>{% for value in values %}<td>{{ value if value != "" else "''" }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
{% endblock %}
"""
