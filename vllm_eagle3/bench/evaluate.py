"""``vllm-eagle3 eval``: what a head gains when it is served, and what was predicted of it.

vLLM answers the questions with every chain and tree (see :mod:`vllm_eagle3.bench.answering`), and
the tokens of each engine step give tau and acceptance by depth, by task and by length of the
context. The same answers are then replayed offline, as ``vllm-eagle3 train`` predicts tau on
held-out text, so that both speak of the same rounds (:mod:`vllm_eagle3.bench.rounds`). What can
part them:

- chance: above temperature 0 the prediction is the mean over what the target might have drawn,
  the served figure one draw of each. The standard error says how far that carries; replaying the
  text itself, ``tau_of_text``, has no such noise;
- rounding: in half precision near ties fall differently in vLLM's kernels than in PyTorch's;
- trimmed trees: vLLM verifies fewer drafts in the last rounds before ``--max-model-len``.
"""

import argparse
import sys
from pathlib import Path

from vllm_eagle3.bench import answering, evaluate_report
from vllm_eagle3.bench.configurations import check_plugin
from vllm_eagle3.bench.evaluate_results import merge
from vllm_eagle3.bench.options import add_configurations, add_data, add_pair, select
from vllm_eagle3.bench.output import PLOTS_REMEDY, make_log_folder, write_results
from vllm_eagle3.bench.pair import check_pair, check_prediction
from vllm_eagle3.bench.prediction import Prediction, predict
from vllm_eagle3.bench.questions import load_questions

_CHAINS, _TREES = [5], ["63"]  # the tree of `"tree": true`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    add = parser.add_argument
    add_pair(parser)
    add_data(parser)
    add_configurations(parser, _CHAINS, _TREES, one_size=True)
    answering.add_arguments(parser)
    add("--no-prediction", action="store_true", help="served figures only")
    add("--prediction-timeout", type=float, help="seconds for the prediction (no limit)")
    add(
        "--output",
        "--out",
        type=Path,
        default=Path("eval.json"),
        help="JSON file; tables (.md) and plots (.png) go beside it (default: eval.json)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve, replay and report; 0 if every configuration and the prediction finished, else 1.

    Raises:
        ValueError: a setting that cannot work, before any engine starts.
    """
    answering.check_arguments(args)
    configurations = select(args, plain=False)
    for configuration in configurations:
        configuration.as_tree  # noqa: B018 (raises before anything is served)
    check_pair(args, configurations, args.max_model_len)
    check_plugin(configurations)
    questions = load_questions(args.data, args.limit)
    if not args.no_prediction:
        check_prediction(args)
    log_dir = make_log_folder(args.output)
    runs = answering.answer(args, configurations, questions, log_dir)
    if args.no_prediction:
        prediction = Prediction()
    else:
        prediction = predict(args, configurations, runs, log_dir / "prediction.log")
    results = merge(args, configurations, runs, prediction, questions)
    tables = evaluate_report.render(results)
    print(tables)
    write_results(args.output, results, tables)
    try:
        from vllm_eagle3.bench import evaluate_plots

        evaluate_plots.write(results, args.output)
    except ModuleNotFoundError as error:
        print(f"vllm-eagle3: no plots, {error}: {PLOTS_REMEDY}", file=sys.stderr)
    return 1 if prediction.error or any(run.error for run in runs) else 0
