# %% [markdown]
# # Private training
#
# DP-FedAvg (McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models"):
# whoever sees the params of all rounds learns little about any one client, at most $\varepsilon$.
# The noise that it takes follows from how clients are sampled, and from the number of rounds. Needs
# the extra `privacy`, which does the accounting.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import fedjax_lite as fl

fl.configure_cpu()
num_rounds = 40

# %% [markdown]
# Clients of one image each, by Poisson sampling: each takes part in a round with the same
# probability.

# %%
images = fl.data.digits_images()
dataset = fl.FederatedDataset.from_rows(images, np.arange(1500)[:, None])
held_out = {name: x[1500:] for name, x in images.items()}
rate, delta = 0.2, 1e-4
sampler = fl.samplers.poisson(dataset.num_clients, rate)
epsilons = [0.3, 1.0, 3.0]
noise = [fl.privacy.calibrate(epsilon, delta, num_rounds, sampler) for epsilon in epsilons]

# %% [markdown]
# No client has a weight above 1, or changes the sum by more than 0.5; the noise is in proportion to
# that; and the mean divides by the expected number of clients, not by the actual one.

# %%
model = fl.models.logistic((64,), 10)


def dp_fed_avg(noise_multiplier):
    return fl.fed_avg(
        model,
        client_optimizer=optax.sgd(0.5),
        server_optimizer=optax.sgd(1.0, momentum=0.9),
        num_steps=2,
        pipeline=fl.chain(
            fl.cap_weight(1.0), fl.clip_by_norm(0.5), fl.gaussian_noise(noise_multiplier)
        ),
        reducer=fl.weighted_mean(denominator=rate * dataset.num_clients),
    )


# %% [markdown]
# The noise may be an array, so all runs are one program. The history has the epsilon of each.

# %%
found = fl.sweep(
    dp_fed_avg,
    dataset.resident(),
    sampler,
    num_rounds,
    keys=jax.random.split(jax.random.key(0), len(noise)),
    numbers={"noise_multiplier": noise},
    evaluate=lambda state: fl.evaluate(model, state, held_out),
    privacy=fl.privacy.budget(delta),
)
last = [history.evaluations[-1] for history in found.histories]
for z, row in zip(noise, last, strict=True):
    print(f"epsilon {row['epsilon']:.2f}: noise {z:.2f}, accuracy {row['accuracy']:.3f}")
plt.semilogx([row["epsilon"] for row in last], [row["accuracy"] for row in last], "o-")
plt.xlabel("epsilon")
plt.ylabel("held-out accuracy")
plt.savefig("private_training.png")
