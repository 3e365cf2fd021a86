"""A round of FedAvg against the same work without federation, and against other simulators.

    python -m benchmarks.cohort [--case NAME] [--lanes L ...] [--json]

For each case: `round_s`, one round on all devices; `bare_s`, one compiled loop of as many SGD
steps of the same size on one device, without clients, deltas or weights; `price`, one round on
one device over `bare_s`; `torch_s`, a plain PyTorch loop over clients and batches, at its best;
`torch_vmap_s`, `torch.func.vmap` over clients with `torch.compile`; `fedjax_s`, FedJAX's FedAvg.
All in one run, in turn, compilation apart. The cases `hosts`, `layout`, `lora` and `store` are of
another kind: see the modules of these names.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import fedjax_lite as fl
from benchmarks import ours, peers
from benchmarks.cases import CASES, Case, Contestant, dataset, initial_params, torch_dense
from benchmarks.hosts import measure_hosts
from benchmarks.layout import measure_layout
from benchmarks.lora import measure_lora
from benchmarks.store import measure_store
from benchmarks.timing import interleaved, machine, usable_cores
from fedjax_lite.engine.execution import Execution, choose_lanes

_OTHERS = {
    "hosts": measure_hosts,
    "layout": measure_layout,
    "lora": lambda repeats: measure_lora(),
    "store": lambda repeats: measure_store(),
}


def find_peers(
    case: Case, data: fl.FederatedDataset, params: Any, stack: contextlib.ExitStack
) -> dict[str, Contestant]:
    """The other simulators that run here; those in PyTorch on the GPU if there is one."""
    cores = usable_cores()
    found: dict[str, Contestant | None] = {}
    if peers.DEVICE.type == "cuda":
        found["PyTorch"] = peers.torch_loop(case, data, params, cores)
    else:
        processes = peers.torch_processes(case, data, params, cores)
        found["PyTorch, 1 thread"] = peers.torch_loop(case, data, params, 1)
        found[f"PyTorch, {cores} threads"] = peers.torch_loop(case, data, params, cores)
        found[f"PyTorch, {cores} processes"] = stack.enter_context(processes)
    # Clients of several sizes do not stack, and convolutions under vmap are slow in PyTorch too.
    if case.torch_module is torch_dense and case.uniform:
        found["torch.func.vmap"] = peers.torch_vmap(case, data, params, cores)
    found["FedJAX"] = stack.enter_context(peers.fedjax_process(case))
    return {name: contestant for name, contestant in found.items() if contestant is not None}


def check(case: Case, contestants: Mapping[str, Contestant]) -> None:
    """Runs each contestant and compares what it did with what the first one did.

    Raises:
      ValueError: The number of steps is another than the case's, or the norm of the mean delta
        is another. Where last batches are short, it depends on the examples that fall into them,
        which each contestant draws for itself: there, the mean of four runs counts.
    """
    tolerance, repeats = (0.03, 1) if case.uniform else (0.1, 4)
    expected: float | None = None
    for name, contestant in contestants.items():
        work = [contestant.work(contestant.run()) for _ in range(repeats)]
        norm, num_steps = statistics.mean(norm for norm, _ in work), work[-1][1]
        expected = norm if expected is None else expected
        if num_steps != case.steps.sum() or not abs(norm / expected - 1) < tolerance:
            raise ValueError(
                f"{name} took {num_steps} steps to a delta of norm {norm:.4g}, where"
                f" {case.steps.sum()} steps to about {expected:.4g} were due; correct its set-up."
            )


def measure(name: str, repeats: int, lanes: Sequence[int | None]) -> dict[str, Any]:
    """One case, all contestants in turn; ours at each number of lanes."""
    case = CASES[name]
    data, params = dataset(case), initial_params(case)
    num_clients, num_devices = case.sizes.size, jax.device_count()
    contestants: dict[str, Contestant] = {}
    compile_s: dict[int, float] = {}
    mesh = fl.clients_mesh()
    for chosen in dict.fromkeys(
        choose_lanes(Execution(n, mesh), params, num_clients) for n in lanes
    ):
        for devices in sorted({1, num_devices}):
            contestants[f"ours, {chosen} lanes on {devices}"], compile_s[chosen] = ours.our_round(
                case, data, params, devices, chosen
            )
    product, product_flops = ours.matrix_product(num_devices)
    with contextlib.ExitStack() as stack:
        contestants |= find_peers(case, data, params, stack)
        check(case, contestants)
        runs = {contestant: run for contestant, (run, _) in contestants.items()}
        runs["bare, one device"] = ours.bare(case, params)
        runs["matrix product"] = product
        times = interleaved(runs, repeats)
    for contestant, timing in times.items():
        print(f"{name}: {contestant}: {timing} s", file=sys.stderr)

    bare_s = times["bare, one device"].median
    sweep = [
        {
            "lanes": chosen,
            "lane_steps": ours.lane_steps(case, num_devices, chosen),
            "round_s": times[f"ours, {chosen} lanes on {num_devices}"].median,
            "price": times[f"ours, {chosen} lanes on 1"].median / bare_s,
            "compile_s": compile_s[chosen],
        }
        for chosen in compile_s
    ]
    best = min(sweep, key=lambda entry: entry["round_s"])

    def seconds(prefix: str) -> float | None:
        medians = [timing.median for name, timing in times.items() if name.startswith(prefix)]
        return min(medians, default=None)

    def speedup(peer_s: float | None) -> float | None:
        return None if peer_s is None else peer_s / best["round_s"]

    peer_s = {
        "torch": seconds("PyTorch"),
        "torch_vmap": seconds("torch.func.vmap"),
        "fedjax": seconds("FedJAX"),
    }
    # A peak is what the machine did at its best.
    peak = product_flops / times["matrix product"].fastest
    return {
        "case": name,
        "clients": num_clients,
        "real_steps": int(case.steps.sum()),
        "bare_s": bare_s,
        **best,
        **{f"{peer}_s": s for peer, s in peer_s.items()},
        **{f"speedup_{peer}": speedup(s) for peer, s in peer_s.items()},
        "client_updates_per_s": num_clients / best["round_s"],
        "roofline": ours.model_flops(case, params) / (best["round_s"] * peak),
        "peak_flops_per_s": peak,
        "devices": num_devices,
        **({"lane_sweep": sweep} if len(lanes) > 1 else {}),
    }


def summary(report: Mapping[str, Any]) -> str:
    """One line for a reader."""
    if report["case"] not in CASES:
        return ", ".join(f"{name} {value:.6g}" for name, value in report.items() if name != "case")
    speedups = (
        f"{report[f'speedup_{peer}']:.2f} times {name}"
        for peer, name in (
            ("torch", "PyTorch"),
            ("torch_vmap", "torch.func.vmap"),
            ("fedjax", "FedJAX"),
        )
        if report[f"speedup_{peer}"] is not None
    )
    return (
        f"{report['case']}: {report['client_updates_per_s']:.0f} client updates/s,"
        f" {', '.join(speedups)}, price {report['price']:.2f}, roofline {report['roofline']:.2f}"
    )


def main() -> None:
    """Runs the benchmark and prints its report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cohort", description=__doc__)
    names = [*CASES, *_OTHERS]
    parser.add_argument("--case", choices=names, help="one case; all of them by default")
    parser.add_argument(
        "--lanes",
        type=int,
        nargs="+",
        default=[None],
        help="numbers of lanes to try, of which the fastest is reported; the package's own choice"
        " by default",
    )
    parser.add_argument("--repeats", type=int, default=5, help="repeats, at least 5")
    parser.add_argument("--json", action="store_true", help="print one JSON object per case")
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error("--repeats must be at least 5")
    fl.configure_cpu()
    for name in [options.case] if options.case else names:
        if name in _OTHERS:
            report = _OTHERS[name](options.repeats)
        else:
            report = measure(name, options.repeats, options.lanes)
        if options.json:
            report |= machine("fedjax_lite", "jax", "optax", "torch")
            print(json.dumps(report), flush=True)
        else:
            print(summary(report), flush=True)


if __name__ == "__main__":
    main()
