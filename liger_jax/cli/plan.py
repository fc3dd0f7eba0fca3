"""`liger-jax plan`."""

from liger_jax import runtime
from liger_jax.cli.app import ModelArgument
from liger_jax.options import PlanOptions


def plan(
    model: ModelArgument,
    run: PlanOptions = PlanOptions(),
    compile: bool = False,
) -> None:
    """Estimate memory, communication and speed of a training run on GPUs that need not be here.

    Args:
        model: A preset such as qwen2_vl_7b, or an Orbax folder, a Hugging Face folder or a hub id; only config.json is read.
        compile: Also compile the step for the best mesh, for its exact memory; needs jax[cuda12], but no GPU.
    """
    runtime.compile_without_gpus()
    from liger_jax import plan as planner
    from liger_jax.cli.plan_report import compiled_report, report

    config = planner.read_config(model)
    plans = planner.make_plans(config, run)
    print(report(run, plans))
    if compile:
        print(compiled_report(config, run, plans[0]))
