# %% [markdown]
# # A first simulation
#
# FedAvg (McMahan et al. 2017, Algorithm 1) on 1,800 images of digits, dealt to 50 clients so that
# each has few classes. In each round, 20 clients train a copy of the server's params on their own
# images, and the server takes the mean of their updates.

# %%
import jax
import matplotlib.pyplot as plt
import optax

import fedjax_lite as fl

fl.configure_cpu()  # one device per core; on accelerators it does nothing
num_rounds = 60

# %% [markdown]
# Data, a model and an algorithm are values, and others of their kind go in their places.

# %%
dataset, held_out = fl.data.digits(num_clients=50, alpha=0.3)
population = dataset.resident()
model = fl.models.logistic((64,), 10)
algorithm = fl.fed_avg(
    model,
    client_optimizer=optax.sgd(0.1),
    server_optimizer=optax.sgd(1.0),
    num_epochs=5,
    batch_size=16,
)

# %% [markdown]
# A round is a pure function of a key, a state and a cohort. Only the first one compiles.

# %%
state, accuracies = algorithm.init(jax.random.key(0)), []
for key in jax.random.split(jax.random.key(1), num_rounds):
    key_cohort, key_round = jax.random.split(key)
    cohort = fl.cohort(key_cohort, population, 20)
    state, info = algorithm.round(key_round, state, cohort)
    accuracies.append(float(fl.evaluate(model, state, held_out)["accuracy"]))
print(f"held-out accuracy after {num_rounds} rounds: {accuracies[-1]:.3f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.plot(range(1, num_rounds + 1), accuracies)
left.set(xlabel="round", ylabel="held-out accuracy")
fl.plot.partition(dataset, axes=right)
figure.savefig("first_simulation.png")
