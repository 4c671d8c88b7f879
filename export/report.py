"""`parity.md`: the proof of an export for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from nsam.runtime.card import ModelCard


def as_markdown(proof: dict[str, Any], card: ModelCard) -> str:
    """The text of `parity.md` for what `parity.json` holds."""
    others = ", ".join(map(str, card.input.other_sizes))
    parts = [
        f"# {card.name} {card.version}: parity\n",
        f"Every link of the chain over {proof['tiles']} real tiles of {card.input.size} px, in batches of "
        f"{', '.join(map(str, proof['batches']))}, {f'one of each other size ({others}), ' if others else ''}"
        f"and over {proof['images']} labelled images, of which training saw "
        f"{proof['trained_on']}. **"
        f"{'All passed.' if proof['passed'] else 'FAILED: ' + ', '.join(card.failed_links)}**\n",
        _table(
            ("link", "max of maps", "p99.9", "mean", "Dice", "AJI", "PQ", "gate", ""),
            (
                (
                    f"{link['before']} -> {link['after']}",
                    *(f"{link[name]:.1e}" for name in ("max", "p999", "mean")),
                    *(f"{link['metrics'][name]:.4f}" for name in ("dice", "aji", "pq")),
                    link["gate"],
                    "passed" if link["passed"] else "**FAILED**",
                )
                for link in proof["links"]
            ),
        ),
        "All columns are |differences|, the nucleus map as a probability. `parity-*.jpg` shows, for each link that can "
        "be seen to differ, its worst "
        "tile: tissue, nucleus probability before and after, and ten times their difference.\n",
        "## Graphs\n",
        _table(
            ("graph", "operators", "parameters", "MB"),
            (
                (name, f"{size['operators']:,}", f"{size['parameters']:,}", f"{size['megabytes']:.1f}")
                for name, size in proof["graphs"].items()
            ),
        ),
    ]
    if "fp16" in proof:
        parts += _fp16(proof["fp16"])
    if "bf16" in proof:
        parts += _bf16(proof["bf16"], "bf16" in card.proven)
    if "int8" in proof:
        parts += _int8(proof["int8"])
    return "\n".join(parts)


def _fp16(details: dict[str, Any]) -> list[str]:
    kept = Counter((entry["operator"], entry["reason"]) for entry in details["kept_fp32"])
    return [
        "## fp16\n",
        "Proven on a CPU by a graph that rounds every tensor to fp16 where the fp16 graph does, with sums in fp32 "
        "(ONNX Runtime's CPU provider would run fp16 nodes in fp32). What stays fp32:\n",
        _table(("operator", "nodes", "why"), ((op, n, why) for (op, why), n in sorted(kept.items()))),
        "Largest activations over the tiles (fp16 ends at 65,504):\n",
        _table(
            ("tensor", "max of absolute values"),
            ((f"`{e['tensor']}`", f"{e['max_abs']:.0f}") for e in details["largest_activations"]),
        ),
    ]


def _bf16(details: dict[str, Any], passed: bool) -> list[str]:
    how = (
        "by a graph that rounds weights and every tensor to bf16, with sums in fp32: OpenVINO's could not be had."
        if details["rounded"]
        else "by OpenVINO on a CPU that has it."
    )
    return ["## bf16\n", f"{'Proven' if passed else 'Not proven'} {how}\n"]


def _int8(details: dict[str, Any]) -> list[str]:
    rows = (
        (
            trial["groups_left_out"],
            *(f"{trial['metrics'][name]:.4f}" for name in ("dice", "aji", "pq")),
            "passed" if trial["passed"] else "failed",
            f"{trial['speed']:.2f}",
        )
        for trial in details["tried"]
    )
    ranges = "also those of the proof, for there are few others" if details["ranges_of_proof"] else "none of the proof"
    outcome = "The last one is shipped." if "left_in_fp32" in details else "None is shipped."
    return [
        "## int8\n",
        f"Ranges of the activations come from training images, {ranges}.\n",
        _table(("parts left in fp32", "Dice", "AJI", "PQ", "gate", "speed over fp32 here"), rows),
        outcome + "\n",
    ]


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
