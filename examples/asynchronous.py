# %% [markdown]
# # Asynchronous training
#
# Some clients are ten times as slow as others. A synchronous round waits for the slowest; in
# FedBuff (Nguyen et al. 2022) clients train all the time, and the server takes a step whenever a
# few updates have arrived, also from clients that started from old params. Which is more accurate
# at a given time?

# %%
import jax
import optax

import fedjax_lite as fl

fl.configure_cpu()
num_rounds = 60

# %%
dataset, held_out = fl.data.digits(num_clients=100, alpha=1.0)
population, model = dataset.resident(), fl.models.logistic((64,), 10)
durations = fl.durations.log_normal(1.0, persistent=True)  # Seconds, drawn once for each client.


def train(algorithm, sampler, num_rounds):
    return fl.train(
        algorithm,
        population,
        sampler,
        num_rounds,
        key=jax.random.key(0),
        evaluate=lambda state: fl.evaluate(model, state, held_out),
        eval_every=5,
    )


# %% [markdown]
# Which clients train when does not depend on the params, so the whole schedule is known before
# training: in both 20 clients at a time, and in FedBuff a server step for every 5 updates.

# %%
fed_buff = fl.samplers.fed_buff(
    dataset.num_clients,
    num_rounds=4 * num_rounds,
    concurrency=20,
    buffer_size=5,
    durations=durations,
    max_staleness=20,
)
asynchronous = fl.fed_avg(
    model,
    optax.sgd(0.1),
    optax.sgd(0.5, momentum=0.5),
    weighting="uniform",
    pipeline=fl.polynomial_staleness(0.5),
    reducer=fl.weighted_mean(denominator=5),
    max_staleness=fed_buff.max_staleness,
)
synchronous = fl.fed_avg(model, optax.sgd(0.1), optax.sgd(1.0, momentum=0.5), weighting="uniform")
timed = fl.samplers.timed(fl.samplers.uniform(dataset.num_clients, 20), durations)
results = {
    "FedBuff, 5 of 20": train(asynchronous, fed_buff, 4 * num_rounds),
    "synchronous, 20": train(synchronous, timed, num_rounds),
}

# %%
for name, result in results.items():
    accuracy = result.history.evaluations[-1]["accuracy"]
    seconds = result.history.rounds[-1]["wall_clock"]
    print(f"{name}: accuracy {accuracy:.3f} after {seconds:.0f} simulated seconds")
axes = fl.plot.curves(results, "accuracy", against="wall_clock")
axes.get_figure().savefig("asynchronous.png")
