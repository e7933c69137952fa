"""What a verification found, for people and for programs."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastattn.testing.cases import AdditiveCase, Case, LinearLossCase, LossCase, WeightsCase
from fastattn.testing.checks import FAIL, NOTE, PASS, UNSUPPORTED, Check

STYLES = {PASS: "green", FAIL: "bold red", NOTE: "yellow", UNSUPPORTED: "cyan"}
MAX_LISTED = 20


@dataclass(frozen=True)
class CaseResult:
    """The checks of one case; `command` runs it again alone."""

    case: Case | WeightsCase | AdditiveCase | LossCase | LinearLossCase
    label: str
    checks: list[Check]
    command: str
    seconds: float

    @property
    def status(self) -> str:
        """The worst of its checks. A case that ran in part (no gradient, say) is not unsupported."""
        statuses = {check.status for check in self.checks}
        if FAIL in statuses:
            return FAIL
        if statuses == {UNSUPPORTED}:
            return UNSUPPORTED
        return NOTE if NOTE in statuses else PASS

    @property
    def worst(self) -> float:
        return max((check.ratio for check in self.checks if check.ratio is not None), default=0.0)


@dataclass
class Report:
    """All case results of one target."""

    target: str
    signature: str
    seed: int
    results: list[CaseResult] = field(default_factory=list)

    def with_status(self, status: str) -> list[CaseResult]:
        return [result for result in self.results if result.status == status]

    @property
    def judged(self) -> int:
        return len(self.results) - len(self.with_status(UNSUPPORTED))

    @property
    def ok(self) -> bool:
        """Nothing failed, and something was judged."""
        return self.judged > 0 and not self.with_status(FAIL)

    @property
    def verdict(self) -> str:
        failures, seconds = len(self.with_status(FAIL)), sum(result.seconds for result in self.results)
        text = f"{self.judged - failures} of {self.judged} cases passed"
        unsupported = len(self.with_status(UNSUPPORTED))
        if unsupported:
            text += f", {unsupported} not supported by the target"
        if not self.judged:
            text = f"nothing could be judged: all {unsupported} cases are not supported by the target"
        return f"{text} ({seconds:.0f} s)"

    def raise_on_failure(self) -> None:
        """AssertionError with every failing check and the command that runs its case again."""
        if self.ok:
            return
        lines = [f"{self.target}: {self.verdict}"]
        for result in self.with_status(FAIL)[:MAX_LISTED]:
            lines.append(f"{result.label}: {result.case}\n  {result.command}")
            lines += [f"  {check.name}: {check.detail}" for check in result.checks if check.status == FAIL]
        raise AssertionError("\n".join(lines))

    def print(self, console: Console, verbose: bool = False) -> None:
        """The table of checks, the failures with their commands, what was not supported, and the verdict. `verbose`
        lists every case too."""
        if verbose:
            console.print(self._case_table())
        console.print(self._check_table())
        for result in self.with_status(FAIL)[:MAX_LISTED]:
            console.print(f"[bold red]FAIL[/] {result.label}: {escape(str(result.case))}")
            for check in result.checks:
                if check.status == FAIL:
                    console.print(f"  {check.name}: {escape(check.detail)}", soft_wrap=True)
            console.print(f"  run it again: [bold]{escape(result.command)}[/]", soft_wrap=True)
        hidden = len(self.with_status(FAIL)) - MAX_LISTED
        if hidden > 0:
            console.print(f"... and {hidden} more failing cases (all of them with --json)")
        for status, heading in ((NOTE, "notes"), (UNSUPPORTED, "not supported by the target")):
            self._print_reasons(console, status, heading)
        style = "bold green" if self.ok else "bold red"
        console.print(f"[{style}]{escape(self.target)}: {escape(self.verdict)}[/]")

    def _print_reasons(self, console: Console, status: str, heading: str) -> None:
        reasons = Counter(
            f"{check.name}: {check.detail}"
            for result in self.results
            for check in result.checks
            if check.status == status
        )
        if reasons:
            console.print(f"[{STYLES[status]}]{heading}[/]")
        for reason, count in reasons.most_common(8):
            console.print(f"  {count} x {escape(reason)}", soft_wrap=True)
        if len(reasons) > 8:
            console.print(f"  ... and {len(reasons) - 8} other reasons")

    def _check_table(self) -> Table:
        table = Table(title=f"{self.target} ({self.signature} signature), seed {self.seed}", title_justify="left")
        table.add_column("check")
        for status in (PASS, FAIL, NOTE, UNSUPPORTED):
            table.add_column(status, justify="right", style=STYLES[status])
        table.add_column("worst error / bound", justify="right")
        table.add_column("in case")
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        worst: dict[str, tuple[float, str]] = {}
        for result in self.results:
            family = result.label.partition(":")[0] + " " if ":" in result.label else ""
            for check in result.checks:
                name = family + check.name
                counts[name][check.status] += 1
                if check.ratio is not None and check.ratio >= worst.get(name, (-1.0, ""))[0]:
                    worst[name] = (check.ratio, result.label)
        for name, count in counts.items():
            ratio, label = worst.get(name, (math.nan, ""))
            shown = "" if math.isnan(ratio) else f"{ratio:.2f}"
            table.add_row(name, *(str(count[s] or "") for s in (PASS, FAIL, NOTE, UNSUPPORTED)), shown, label)
        return table

    def _case_table(self) -> Table:
        table = Table(show_edge=False)
        for column in ("case", "status", "error / bound", "seconds", "problem"):
            table.add_column(column, overflow="fold")
        for result in self.results:
            status = f"[{STYLES[result.status]}]{result.status}[/]"
            table.add_row(
                result.label, status, f"{result.worst:.2f}", f"{result.seconds:.2f}", escape(str(result.case))
            )
        return table

    def to_json(self) -> str:
        """One JSON object. Ratios that are infinite (a wrong shape, a NaN) are null."""
        return json.dumps(
            {
                "target": self.target,
                "signature": self.signature,
                "seed": self.seed,
                "ok": self.ok,
                "cases": [
                    {
                        "label": result.label,
                        "problem": str(result.case),
                        "status": result.status,
                        "seconds": round(result.seconds, 4),
                        "command": result.command,
                        "checks": [
                            {
                                "name": check.name,
                                "status": check.status,
                                "detail": check.detail,
                                "ratio": check.ratio
                                if check.ratio is not None and math.isfinite(check.ratio)
                                else None,
                            }
                            for check in result.checks
                        ],
                    }
                    for result in self.results
                ],
            },
            indent=1,
        )
