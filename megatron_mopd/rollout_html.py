"""A shard's rollouts as one HTML page that needs nothing else: no script, no font, no address outside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_mopd import palette, rollout_view, shards
from megatron_mopd.rollout_view import View

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #ffffff; margin: 2em auto 7em;
  max-width: 70em; padding: 0 1em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.05em; margin: 1.8em 0 0.2em; }
table { border-collapse: collapse; }
th { text-align: left; font-weight: 600; padding-right: 1.5em; white-space: nowrap; }
th, td { vertical-align: top; padding-bottom: 0.15em; }
code, pre, .tokens { font-family: ui-monospace, monospace; font-size: 14px; overflow-wrap: anywhere; }
pre { background: #f4f4f4; padding: 0.4em 0.6em; margin: 0.3em 0; white-space: pre-wrap; }
.about { color: #555555; margin: 0; } .tokens { line-height: 1.9; }
.t { padding: 2px 0; border-radius: 2px; box-shadow: inset 0 0 0 1px #e3e3e3; white-space: pre-wrap; cursor: default; }
.u { text-decoration: line-through; text-decoration-thickness: 2px; }
.t:hover { outline: 2px solid #000000; }
.t:hover::after { content: attr(data-tip); position: fixed; left: 0; right: 0; bottom: 0; z-index: 1; color: #1a1a1a;
  background: #ffffff; border-top: 2px solid #000000; padding: 0.6em 1em; white-space: pre-wrap;
  text-decoration: none; font: 14px/1.5 ui-monospace, monospace; }
"""


def page(header: Mapping[str, Any], views: Sequence[View], scale: float) -> str:
    """The page of the shard with ``header``; ``scale`` is the advantage that gets the full colour."""
    title = f"{header['policy']['run_id']}, step {header['step']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        _table(_provenance(header, views)),
        _legend(scale),
        *(_rollout(view, scale) for view in views),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _provenance(header: Mapping[str, Any], views: Sequence[View]) -> list[tuple[str, str]]:
    policy, metrics = header["policy"], header["metrics"]
    start = policy["initial_id"] or "weights drawn from run.seed"
    rows = [
        ("student", f"run {policy['run_id']} at step {policy['step']}, started from {start}"),
        *(
            (f"teacher {name}", f"checkpoint {teacher['checkpoint_id']}, domains {', '.join(teacher['domains'])}")
            for name, teacher in (header["teachers"] or {}).items()
        ),
        ("routing", ", ".join(f"{domain} → {teacher}" for domain, teacher in header["routing"].items()) or "none"),
        ("tokenizer", header["tokenizer_sha"]),
        ("chat template", header["template_sha"]),
    ]
    records = [shards.rollout(view.kept).provenance for view in views]
    sampling = sorted(
        {
            f"temperature {r.sampling.temperature:g}, top_p {r.sampling.top_p:g}, at most {r.sampling.max_new_tokens}"
            f" tokens, seed {r.seed}, draw {r.draw}"
            for r in records
            if r is not None
        }
    )
    rows += [("sampling", line) for line in sampling]
    rows += [("stopped", header["stopped"])] if "stopped" in header else []
    rows += [
        ("objective", json.dumps(header["objective"])),
        ("layout", ", ".join(f"{name} {value}" for name, value in header["layout"].items())),
        ("update", ", ".join(f"{name} {metrics[name]}" for name in ("loss", "grad_norm", "lr") if name in metrics)),
        ("rollouts shown", str(len(views))),
    ]
    return rows


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "\n".join(f"<tr><th>{escape(name)}</th><td><code>{escape(value)}</code></td></tr>" for name, value in rows)
    return f"<table>\n{cells}\n</table>"


def _legend(scale: float) -> str:
    steps = [scale * i / 4 for i in range(-4, 5)]
    cells = "".join(f'<span class="t" style="{_style(value, scale)}"> {value:+.2f} </span>' for value in steps)
    return (
        f'<p class="tokens">{cells}</p>\n<p class="about">Advantage in nats: orange tokens are less likely, blue ones'
        " more likely under the teacher. Struck through: did not count in the update. Point at a token for its"
        " numbers.</p>"
    )


def _rollout(view: View, scale: float) -> str:
    plain = shards.rollout(view.kept)
    tokens = "".join(_token(view, index, known, scale) for index, known in enumerate(rollout_view.numbers(view)))
    return (
        f"<h2>{escape(plain.prompt.domain)}</h2>\n"
        f'<p class="about">{escape(rollout_view.heading(view))}</p>\n'
        f"<pre>{escape(view.prompt)}</pre>\n"
        f'<div class="tokens">{tokens}</div>'
    )


def _token(view: View, index: int, known: Mapping[str, float], scale: float) -> str:
    token, reason = view.tokens[index], view.uncounted[index]
    number = int(shards.rollout(view.kept).completion[index])
    lines = [f"token {index}: {token!r} (id {number})   teacher {view.teacher or 'none'}   {reason or 'counted'}"]
    lines.append("   ".join(f"{_NAMES.get(name, name)} {value:.6g}" for name, value in known.items()))
    tip = escape("\n".join(lines)).replace("\n", "&#10;")
    kind = "t" if reason is None else "t u"
    style = _style(view.advantages[index], scale)
    line_end = "<br>" if token.endswith("\n") else ""
    return f'<span class="{kind}" style="{style}" data-tip="{tip}">{escape(palette.visible(token))}</span>{line_end}'


_NAMES = {
    "teacher": "log p(teacher)",
    "student": "log p(student, at the update)",
    "behaviour": "log p(student, as drawn)",
    "importance": "importance c_t",
    "ratio": "ratio r_t",
    "mask": "mask m_t",
}


def _style(advantage: float, scale: float) -> str:
    ground = palette.advantage_colour(advantage, scale)
    return f"background:{palette.hexadecimal(ground)};color:{palette.readable_on(ground)}"
