"""Does the main job still give what is written down? Runs it several times, from teachers that differ in a last digit.

    python benchmarks/main_job.py                        # three runs of the quickstart, a quarter of an hour each
    python benchmarks/main_job.py --recipe quickstart_smoke --runs 5

Some hundred steps of batch 1 are chaotic: runs that agree to seven digits in the first step of stage 3 differ in the
third digit five steps later, and by some per cent at their end. One run says little; this prints every run, their mean
and spread, and the ratio of the mean perplexity to the recorded one. Exit code 1 where that ratio is outside of what
the spread allows. A run that was stopped resumes where it was.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import torch

from limbeck import Recipe, distill
from limbeck.models.loading import load_teacher, resolve_teacher

RECORDED = Path(__file__).with_name("main_job.json")


def one_run(name: str, number: int, out: Path) -> dict[str, float]:
    """Perplexities and agreement of one run; number 0 has the teacher as it is."""
    teacher, tokenizer = load_teacher(resolve_teacher("embedded"), torch.device("cpu"))
    with torch.no_grad():
        next(p for n, p in teacher.named_parameters() if n.endswith("k_proj.weight")).mul_(1 + 1e-6 * number)
    recipe = Recipe.load(name, {"out": str(out / f"{name}-{number}")})
    held = distill(recipe, loaded=(teacher, tokenizer), measure_times=False, plot_curves=False)["held_out"]
    return {key: held[key] for key in ("teacher_perplexity", "student_perplexity", "top1_agreement", "kl")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/main-job"))
    parser.add_argument("--record", action="store_true", help="write down what comes out")
    arguments = parser.parse_args()
    runs = []
    for number in range(arguments.runs):
        runs.append(one_run(arguments.recipe, number, arguments.out))
        print(f"run {number}: " + ", ".join(f"{name} {value:.4g}" for name, value in runs[-1].items()), flush=True)
    logs = [math.log(run["student_perplexity"]) for run in runs]
    spread = statistics.stdev(logs) if len(logs) > 1 else 0.0
    mean = math.exp(statistics.fmean(logs))
    print(f"perplexity {mean:.2f}, spread {100 * spread:.1f} %")
    recorded = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    if arguments.record:
        recorded[arguments.recipe] = {"runs": runs, "log_perplexity": statistics.fmean(logs), "spread": spread}
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
        return
    known = recorded.get(arguments.recipe)
    if known is None:
        print("nothing is recorded for this recipe; --record writes it down")
        return
    ratio = math.exp(statistics.fmean(logs) - known["log_perplexity"])
    # three standard errors of the difference of the two means, by the recorded spread
    allowed = 3 * known["spread"] * math.sqrt(1 / len(known["runs"]) + 1 / len(runs))
    then = math.exp(known["log_perplexity"])
    print(f"ratio to the recorded mean {then:.2f}: {ratio:.3f}")
    print(f"expected: {math.exp(-allowed):.3f} to {math.exp(allowed):.3f}")
    if abs(math.log(ratio)) > allowed:
        sys.exit(1)


if __name__ == "__main__":
    main()
