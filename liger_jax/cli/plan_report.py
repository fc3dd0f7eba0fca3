"""What `liger-jax plan` prints: a table of plans, and the details of the best one."""

from liger_jax.config import QwenVLConfig
from liger_jax.options import PlanOptions
from liger_jax.plan import GIB, USABLE, Plan, batch_rows, link_rates, make_training, memory_limit
from liger_jax.train.ahead import compiled_bytes


def report(options: PlanOptions, plans: list[Plan], *, shown: int = 6) -> str:
    """Returns the best plans as a table, and the details of the first."""
    lines = [
        f"{options.gpus} x {options.gpu}, {memory_limit(options) / GIB:.0f} GiB usable each "
        f"(XLA_PYTHON_CLIENT_MEM_FRACTION={USABLE}; JAX's default is 0.75)",
        f"{batch_rows(options)} sequences per step, of {options.length} tokens, up to {options.patches // 4} of an image",
        "",
        f"{'mesh':<26}{'remat':<11}{'GiB per GPU':>12}{'step':>10}{'tokens/s':>12}{'efficiency':>12}",
    ]
    for plan in plans[:shown]:
        verdict = "" if plan.fits else "   does not fit"
        lines.append(
            f"{plan.name:<26}{plan.remat:<11}{plan.memory.total / GIB:>12.1f}{plan.step_s * 1e3:>7.0f} ms"
            f"{plan.tokens / plan.step_s:>12,.0f}{plan.efficiency:>12.0%}{verdict}"
        )
    best = plans[0]
    parts = [f"{name} {size / GIB:.1f}" for name, size in vars(best.memory).items() if size]
    lines += ["", f"{best.name}, GiB per GPU (computed): {', '.join(parts)}"]
    for axis, size in best.traffic.items():
        rate = link_rates(options).rate(best.mesh, axis, by_device=best.by_device)
        lines.append(
            f"{axis}: {size / 1e9:.2f} GB per GPU and step, {size / rate * 1e3:.0f} ms at {rate / 1e9:.0f} GB/s"
        )
    if not best.splits_heads:
        lines.append(
            f"tensor={best.mesh['tensor']} does not divide the attention heads: each GPU projects all of them, so the step "
            "takes longer than shown"
        )
    if not best.fits:
        lines.append("No mesh fits. More GPUs, fewer sequences per GPU, LoRA or frozen parts need less memory.")
    return "\n".join(lines)


def compiled_report(config: QwenVLConfig, options: PlanOptions, plan: Plan) -> str:
    """Returns the memory of the compiled step, and the distance of the estimate.

    Raises:
        UserError: this machine cannot compile for the kind of GPU.
    """
    training = make_training(config, options, plan.remat)
    size = compiled_bytes(training, plan.mesh, batch_rows(options), gpu=options.gpu, by_device=plan.by_device)
    return (
        f"{plan.name}, compiled: {size / GIB:.1f} GiB per GPU (the estimate is {plan.memory.total / size - 1:+.1%}); "
        f"{'fits' if size <= plan.limit else 'does not fit'}"
    )
