# %% [markdown]
# # An algorithm from its pseudo-code
#
# SCAFFOLD (Karimireddy et al. 2020, Algorithm 1), written from nothing. Client $i$ keeps a control
# variate $c_i$ between rounds, and the server their mean $c$. Each of $K$ local steps from $x$ is
#
# $$y \leftarrow y - \eta (\nabla f_i(y) - c_i + c);$$
#
# after them, with $\Delta c_i = \frac{x - y}{K \eta} - c$, the client and the server do
#
# $$c_i \leftarrow c_i + \Delta c_i, \qquad x \leftarrow x + \mathrm{mean}_i (y - x), \qquad
# c \leftarrow c + \frac{1}{N} \sum_i \Delta c_i.$$

# %%
import jax
import optax

import fedjax_lite as fl

fl.configure_cpu()
num_rounds = 60


# %% [markdown]
# `server` is the server's state, and `client.entry` what the client kept. The functions are those
# of one client; `fl.federated_algorithm` maps them over the cohort.


# %%
def scaffold(model, rate, num_clients, **options):
    def zeros(server):
        return optax.tree.zeros_like(server.params)

    def init(server, client):
        return server.params

    def step(server, client, y, batch, key):
        def mean_loss(params):
            losses, _ = model.loss(params, server.model_state, batch, key)
            return losses.mean(where=batch["mask"])

        corrected = jax.tree.map(
            lambda g, c_i, c: g - c_i + c, jax.grad(mean_loss)(y), client.entry, server.opt_state
        )
        return optax.tree.add_scale(y, -rate, corrected)

    def final(server, client, y):
        moved = optax.tree.sub(server.params, y)
        added = jax.tree.map(lambda m, c: m / client.num_steps / rate - c, moved, server.opt_state)
        entry = optax.tree.add(client.entry, added)
        return fl.ClientResult(moved, weight=1.0, entry=entry, statistics=added)

    def server_step(mean_moved, c, params, *, statistics, **_):
        c = optax.tree.add_scale(c, 1 / num_clients, statistics)
        return optax.tree.scale(-1.0, mean_moved), c

    return fl.federated_algorithm(
        model,
        fl.ClientUpdate(init, step, final, entry=zeros),
        optax.GradientTransformationExtraArgs(optax.tree.zeros_like, server_step),
        broadcast=lambda server: (server.params, server.opt_state),
        **options,
    )


# %% [markdown]
# A comparison with FedAvg, with few classes for each client and many local steps:

# %%
dataset, held_out = fl.data.digits(num_clients=50, alpha=0.1)
population, model = dataset.resident(), fl.models.logistic((64,), 10)
options = {"num_epochs": 5, "batch_size": 16}
algorithms = {
    "SCAFFOLD": scaffold(model, 0.1, num_clients=50, **options),
    "FedAvg": fl.fed_avg(model, optax.sgd(0.1), weighting="uniform", **options),
}
results = {
    name: fl.train(
        algorithm,
        population,
        fl.samplers.uniform(50, 5),
        num_rounds,
        key=jax.random.key(0),
        evaluate=lambda state: fl.evaluate(model, state, held_out),
        eval_every=2,
    )
    for name, algorithm in algorithms.items()
}
for name, result in results.items():
    print(f"{name}: held-out loss {result.history.evaluations[-1]['loss']:.3f}")
fl.plot.curves(results, "loss").get_figure().savefig("own_algorithm.png")
