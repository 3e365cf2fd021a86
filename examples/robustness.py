# %% [markdown]
# # Robust aggregation
#
# A fifth of the clients is hostile and colludes: they know what all others send, and send minus ten
# times its mean (inner-product manipulation, Xie et al. 2020). The mean fails; robust reducers do
# not.

# %%
import jax
import optax

import fedjax_lite as fl

fl.configure_cpu()
num_rounds = 40

# %%
dataset, held_out = fl.data.digits(num_clients=25, alpha=1.0)
population, model = dataset.resident(), fl.models.logistic((64,), 10)
hostile = range(5)  # Of 25 clients.
rules = {
    "mean": fl.weighted_mean(),
    "median (Yin 2018)": fl.coordinate_median(),
    "mixing, trimmed mean (Allouah 2023)": fl.nearest_neighbor_mixing(0.2, fl.trimmed_mean(0.2)),
}


# %% [markdown]
# An attack is a reducer around the one that it attacks.


# %%
def attacked(rule):
    return fl.train(
        fl.fed_avg(
            model,
            client_optimizer=optax.sgd(0.3),
            num_epochs=2,
            batch_size=16,
            reducer=fl.inner_product_manipulation(hostile, rule, factor=10.0),
        ),
        population,
        fl.samplers.everyone(dataset.num_clients),
        num_rounds,
        key=jax.random.key(0),
        evaluate=lambda state: fl.evaluate(model, state, held_out),
        eval_every=2,
    )


results = {name: attacked(rule) for name, rule in rules.items()}
for name, result in results.items():
    last = result.history.rounds[-1]
    accuracy = result.history.evaluations[-1]["accuracy"]
    print(f"{name}: accuracy {accuracy:.3f} with {last['num_hostile']:.0f} hostile clients")
fl.plot.curves(results, "accuracy").get_figure().savefig("robustness.png")
