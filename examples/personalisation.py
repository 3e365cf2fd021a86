# %% [markdown]
# # Personalised models
#
# Where clients differ, one model for all is a compromise. In Ditto (Li et al. 2021) each client
# trains personal params near the server's; in FedPer (Arivazhagan et al. 2019) the last layer is
# personal. The comparison is by the accuracy of each client on its own examples.

# %%
import jax
import optax

import fedjax_lite as fl

fl.configure_cpu()
num_rounds = 40

# %% [markdown]
# 30 clients with two classes each, and a third of their examples held out.

# %%
images = fl.data.digits_images()
rows = fl.partition.pathological(images["y"], 30, classes_per_client=2, seed=0)
train, held_out = fl.FederatedDataset.from_rows(images, rows).split_examples(1 / 3, seed=0)
population = train.resident()
theirs = fl.cohort_of(held_out.resident(), range(30))
model = fl.models.mlp((64,), (32,), 10)
options = {"num_epochs": 2, "batch_size": 10}
ditto = fl.ditto(model, optax.sgd(0.1), mu=0.1, **options)
fed_per = fl.fed_avg(model, optax.sgd(0.1), personal="Dense_1/*", **options)


def train_on(algorithm):
    sampler = fl.samplers.uniform(30, 10)
    return fl.train(algorithm, population, sampler, num_rounds, key=jax.random.key(0)).state


# %% [markdown]
# What is personal is in `state.store`, by client; `algorithm.client_model` combines it with the
# server's params. In Ditto, the server's own model is that of FedAvg.

# %%
with_ditto, with_fed_per = train_on(ditto), train_on(fed_per)
evaluations = {
    "FedAvg": fl.evaluate_clients(model, with_ditto, theirs),
    "Ditto": fl.evaluate_clients(model, with_ditto, theirs, client_model=ditto.client_model),
    "FedPer": fl.evaluate_clients(model, with_fed_per, theirs, client_model=fed_per.client_model),
}
for name, evaluation in evaluations.items():
    spread = fl.summarize_clients(evaluation.clients["accuracy"], theirs.num_examples)
    print(f"{name}: mean {spread['mean']:.3f}, lowest tenth {spread['lowest_tenth']:.3f}")

# %%
axes = fl.plot.clients(evaluations)
axes.get_figure().savefig("personalisation.png")
