# %% [markdown]
# # Fine-tuning with low-rank adapters
#
# A small transformer has learned one language. Clients have texts in another, and fine-tune it: all
# params, or low-rank adapters of its dense layers (Hu et al. 2022, "LoRA"), which the server
# averages (FedIT, Zhang et al. 2024, "Towards Building the Federated GPT").

# %%
import jax
import optax

import fedjax_lite as fl

fl.configure_cpu()
num_rounds = 20

# %% [markdown]
# In a language of 24 words each word mostly determines the next one, by the seed. 100 clients have
# 20 texts each.


# %%
def language(seed):
    _, draw = fl.data.noisy_successors(vocabulary_size=28, sequence_length=12, noise=0.1, seed=seed)
    rows = fl.partition.iid(2000, 100, seed=0)
    texts = fl.FederatedDataset.from_rows(draw(jax.random.key(0), 2000), rows)
    return texts.resident(), draw(jax.random.key(1), 500)


def train(algorithm, model, language, num_rounds, start=None):
    population, held_out = language
    return fl.train(
        algorithm,
        population,
        fl.samplers.uniform(100, 10),
        num_rounds,
        key=jax.random.key(2),
        state=None if start is None else algorithm.init(start),
        evaluate=lambda state: fl.evaluate(model, state, held_out),
        eval_every=2,
    )


model = fl.models.stackoverflow_transformer(
    28, embedding=32, layers=1, num_heads=2, feed_forward=128, dropout_rate=0.0
)
fed_avg = fl.fed_avg(model, optax.adam(0.01), batch_size=10)
base = train(fed_avg, model, language(0), 2 * num_rounds).state.params

# %% [markdown]
# The adapted model is a model like any other. Its base is frozen: it lies on each device once, and
# is neither sent nor averaged.

# %%
adapted = fl.lora(model, rank=4, base=base)
new = language(1)
fed_it = fl.fed_avg(adapted, optax.adam(0.03), batch_size=10)
results = {
    "all params": train(fed_avg, model, new, num_rounds, start=base),
    "adapters": train(fed_it, adapted, new, num_rounds),
}
for name, result in results.items():
    accuracy = result.history.evaluations[-1]["accuracy"]
    kilobytes = result.history.rounds[-1]["bytes_up"] / 10 / 1000
    print(f"{name}: accuracy {accuracy:.3f}, a client sends {kilobytes:.1f} kB a round")
fl.plot.curves(results, "accuracy").get_figure().savefig("lora_fine_tuning.png")
