"""FedAvg, and algorithms against client drift."""

import math

import numpy as np
import torch
from torch.nn import functional

from reference import models
from reference.vectors import Round, Vector, client_weight, mean, norm, taking_part


def fed_avg(
    params, clients, grad, *, cohorts, batches, rate, server_rate=1.0, weighting="examples"
):
    """FedAvg (McMahan et al. 2017, algorithm 1), with a server step (Reddi et al. 2021).

    The mean over the cohort is weighted by examples, or uniform.
    """
    w, history = Vector(params), []
    for cohort, drawn in zip(cohorts, batches, strict=True):
        deltas, weights = [], []
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            w_k = w
            for batch in steps:
                w_k = w_k - rate * grad(w_k, x[batch], y[batch])
            deltas.append(w - w_k)
            weights.append(client_weight(weighting, len(y)))
        w = w - server_rate * mean(deltas, weights)
        history.append(Round(params=w))
    return history


def fed_dyn(
    params,
    clients,
    grad,
    *,
    cohorts,
    batches,
    rate,
    alpha,
    weighting="uniform",
    scale_alpha=False,
):
    """FedDyn (Acar et al. 2021, algorithm 1), its inner problem by SGD.

    The paper weighs clients uniformly: the mean of the params is over the cohort, that of the duals
    over all N clients. Weighted by examples, the share in the latter is that of all examples.
    `scale_alpha` is the authors' code: clients have alpha times the mean size over their own, by
    which uniform means end at the optimum weighted by examples.
    Duals `g_k` (with the sign of gradients) and the server's `h` start at zero. In the authors'
    code a client keeps -g_k / alpha, and the server adds the mean of these over all clients.
    """
    w = Vector(params)
    g = dict.fromkeys(range(len(clients)), 0.0 * w)
    h = 0.0 * w
    sizes = [len(y) for _, y in clients]
    shares = [client_weight(weighting, size) for size in sizes]
    history = []
    for cohort, drawn in zip(cohorts, batches, strict=True):
        trained, weights, moved = [], [], 0.0 * w
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            alpha_k = alpha * np.mean(sizes) / sizes[k] if scale_alpha else alpha
            w_k = w
            for batch in steps:
                gradient = grad(w_k, x[batch], y[batch])
                w_k = w_k - rate * (gradient - g[k] + alpha_k * (w_k - w))
            g[k] = g[k] - alpha_k * (w_k - w)
            moved = moved + shares[k] / sum(shares) * (w_k - w)
            trained.append(w_k)
            weights.append(shares[k])
        h = h - alpha * moved
        w = mean(trained, weights) - h / alpha
        history.append(Round(params=w, duals=dict(g), h=h))
    return history


class SGD:
    """The gradient itself, without a state."""

    def init(self, params):
        return ()

    def direction(self, g, state):
        return g

    def advance(self, g, state):
        return ()


class Momentum:
    """m = (1 - beta) g + beta m, as in Mime's paper; or m = g + beta m, as in optax and PyTorch."""

    def __init__(self, beta, *, damped=True):
        self.beta, self.share = beta, 1 - beta if damped else 1.0

    def init(self, params):
        return 0.0 * params

    def direction(self, g, m):
        return self.share * g + self.beta * m

    advance = direction


class Adam:
    """Adam. In Mime's paper, a step divides by the root of the v kept, and corrects no bias.

    With `fresh`, a step is what optax or PyTorch computes: from m and v with the new gradient in
    both, and their bias corrected. That is Mime with Adam in FedJAX, TFF and FLSim.
    """

    def __init__(self, beta_1=0.9, beta_2=0.999, epsilon=1e-8, *, fresh=False):
        self.beta_1, self.beta_2, self.epsilon, self.fresh = beta_1, beta_2, epsilon, fresh

    def init(self, params):
        return 0.0 * params, 0.0 * params, 0

    def direction(self, g, state):
        if not self.fresh:
            m, v, _ = state
            return ((1 - self.beta_1) * g + self.beta_1 * m) / (v**0.5 + self.epsilon)
        m, v, count = self.advance(g, state)
        m, v = m / (1 - self.beta_1**count), v / (1 - self.beta_2**count)
        return m / (v**0.5 + self.epsilon)

    def advance(self, g, state):
        m, v, count = state
        m = (1 - self.beta_1) * g + self.beta_1 * m
        v = (1 - self.beta_2) * g**2 + self.beta_2 * v
        return m, v, count + 1


def mime(
    params,
    clients,
    grad,
    *,
    cohorts,
    batches,
    base,
    rate,
    server_rate=1.0,
    weighting="examples",
    corrected=True,
    clip=None,
    state=None,
):
    """Mime, or MimeLite unless `corrected` (Karimireddy et al. 2021, algorithm 1).

    `base` is the optimizer that is mimicked, one of `SGD`, `Momentum` and `Adam`, or any with their
    methods; `state` is what it starts with. The paper weighs clients uniformly, FedJAX by examples:
    the deltas, and the full gradients c at the server's params alike. Clients hold the state fixed;
    it moves once a round, with c, in MimeLite too. `clip` bounds the norm of a delta, as in
    FedJAX's MimeLite.
    """
    w, history = Vector(params), []
    state = base.init(w) if state is None else state
    for cohort, drawn in zip(cohorts, batches, strict=True):
        part = taking_part(clients, cohort, drawn)
        weights = [client_weight(weighting, len(clients[k][1])) for k, _ in part]
        c = mean([grad(w, *clients[k]) for k, _ in part], weights)
        deltas = []
        for k, steps in part:
            x, y = clients[k]
            w_k = w
            for batch in steps:
                gradient = grad(w_k, x[batch], y[batch])
                if corrected:
                    gradient = gradient - grad(w, x[batch], y[batch]) + c
                w_k = w_k - rate * base.direction(gradient, state)
            delta = w - w_k
            if clip is not None:
                delta = min(1.0, clip / norm(delta)) * delta
            deltas.append(delta)
        state = base.advance(c, state)
        w = w - server_rate * mean(deltas, weights)
        history.append(Round(params=w, state=state))
    return history


def mime_lite(*args, **options):
    """MimeLite: Mime without the correction of local gradients."""
    return mime(*args, **options, corrected=False)


def fed_exp(
    params,
    clients,
    grad,
    *,
    cohorts,
    batches,
    rate,
    epsilon=1e-3,
    weighting="uniform",
    epsilon_by_cohort=False,
):
    """FedExP (Jhunjhunwala et al. 2023, algorithm 1).

    The server's step size is max(1, sum |d_k|^2 / (2 M (|mean d|^2 + epsilon))) in the paper, whose
    clients weigh the same; weighted, 1 / M is the share of a client. The authors' code, with
    `epsilon_by_cohort`, has M epsilon in place of epsilon. What they evaluate is `averaged`, the
    mean of the last two params.
    """
    w, history = Vector(params), []
    for cohort, drawn in zip(cohorts, batches, strict=True):
        deltas, weights = [], []
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            w_k = w
            for batch in steps:
                w_k = w_k - rate * grad(w_k, x[batch], y[batch])
            deltas.append(w - w_k)
            weights.append(client_weight(weighting, len(y)))
        squares = np.average([norm(delta) ** 2 for delta in deltas], weights=weights)
        delta = mean(deltas, weights)
        guard = len(deltas) * epsilon if epsilon_by_cohort else epsilon
        server_rate = max(1.0, squares / (2 * (norm(delta) ** 2 + guard)))
        before, w = w, w - server_rate * delta
        history.append(Round(params=w, server_rate=server_rate, averaged=mean([before, w])))
    return history


def adapted_mu(values, *, mu=0.0, step=0.1, patience=1):
    """The mu after each of the watched values (Li et al. 2020, FedProx, appendix C.3.3).

    It grows by `step` when the value has not fallen, and shrinks when it has for `patience` rounds
    in a row (5 in the paper, 1 in pfl), within [0, 1]. As in pfl, the first value counts as fallen,
    one that stays the same as not fallen, and it shrinks in every further round of a long row.
    """
    mus, last, row = [], math.inf, 0
    for value in values:
        if value < last:
            row += 1
            if row >= patience:
                mu = max(0.0, mu - step)
        else:
            row = 0
            mu = min(1.0, mu + step)
        last = value
        mus.append(mu)
    return mus


def ada_fed_prox(
    params,
    clients,
    model,
    *,
    cohorts,
    batches,
    rate,
    mu=0.0,
    step=0.1,
    patience=1,
    weighting="examples",
    watch=lambda this: this.training_loss,
):
    """FedProx (Li et al. 2020, algorithm 2), with mu adapted after each round by `adapted_mu`.

    `watch(this)` is the value that should fall, of `this.before` and `this.after`, the server's
    params, and `this.training_loss`: the mean over the examples processed in the round, each at the
    params that its client had. The paper watches the global training loss.
    """
    w, history, values = Vector(params), [], []
    current = mu
    for cohort, drawn in zip(cohorts, batches, strict=True):
        deltas, weights, losses, sizes = [], [], [], []
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            w_k = w
            for batch in steps:
                losses.append(model.loss(w_k, x[batch], y[batch]))
                sizes.append(len(batch))
                w_k = w_k - rate * (model.grad(w_k, x[batch], y[batch]) + current * (w_k - w))
            deltas.append(w - w_k)
            weights.append(client_weight(weighting, len(y)))
        before, w = w, w - mean(deltas, weights)
        loss = np.average(losses, weights=sizes)
        values.append(watch(Round(before=before, after=w, training_loss=loss)))
        used, current = current, adapted_mu(values, mu=mu, step=step, patience=patience)[-1]
        history.append(Round(params=w, mu=used, next_mu=current, training_loss=loss))
    return history


def fed_shuffle(
    params,
    clients,
    grad,
    *,
    cohorts,
    batches,
    rate,
    server_rate=1.0,
    divisor="steps",
    probabilities=None,
    sum_to_one=False,
):
    """FedShuffle (Horvath et al. 2022, algorithm 1), without momentum.

    Client k steps with `rate` over its number of local steps of the round ("steps"), or of an
    epoch, which differ by a constant; FLSim divides by its number of examples ("examples"). The
    server adds the deltas, each with the client's share of all examples of the population over the
    probability that it takes part, by default |S| / N: the weights need not sum to one. Of clients
    drawn in proportion to their sizes, all weigh 1 / |S|. `sum_to_one` is an option of the
    authors' code. Each epoch should be a new permutation: that is up to `batches`.
    """
    w, history = Vector(params), []
    sizes = [len(y) for _, y in clients]
    for cohort, drawn in zip(cohorts, batches, strict=True):
        total, weights = 0.0 * w, 0.0
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            local_rate = rate / {"steps": len(steps), "examples": len(y)}[divisor]
            w_k = w
            for batch in steps:
                w_k = w_k - local_rate * grad(w_k, x[batch], y[batch])
            chance = len(cohort) / len(clients) if probabilities is None else probabilities[k]
            weight = sizes[k] / sum(sizes) / chance
            total = total + weight * (w - w_k)
            weights += weight
        if sum_to_one:
            total = total / weights
        w = w - server_rate * total
        history.append(Round(params=w, weights=weights))
    return history


def sharpness_aware(grad, rho, epsilon=1e-12):
    """The gradient at the params of about the largest loss within `rho` (Foret et al. 2021)."""

    def sharp(w, x, y):
        g = grad(w, x, y)
        return grad(w + rho / (norm(g) + epsilon) * g, x, y)

    return sharp


def fed_sam(
    params, clients, grad, *, cohorts, batches, rate, rho, epsilon=1e-12, weighting="examples"
):
    """FedSAM (Qu et al. 2022, algorithm 1; Caldarola et al. 2022), with FedAvg's server.

    Both gradients are of the same batch, the norm is that over all arrays together, with `epsilon`
    added: 1e-7 in FL-Simulator. Qu et al. weigh clients uniformly.
    """

    sharp = sharpness_aware(grad, rho, epsilon)
    return fed_avg(
        params, clients, sharp, cohorts=cohorts, batches=batches, rate=rate, weighting=weighting
    )


def contrastive_loss(z, z_server, z_previous, temperature):
    """MOON's model-contrastive loss (Li et al. 2021, equation 3), its mean over a batch."""
    to_server = functional.cosine_similarity(z, z_server, dim=1) / temperature
    to_previous = functional.cosine_similarity(z, z_previous, dim=1) / temperature
    return -(to_server - torch.logaddexp(to_server, to_previous)).mean()


def moon(
    params,
    clients,
    forward=models.forward,
    *,
    cohorts,
    batches,
    rate,
    mu,
    temperature=0.5,
    weighting="examples",
):
    """MOON (Li et al. 2021, algorithm 1): cross-entropy and mu times the contrastive loss.

    `forward(params, x)` gives features and logits, in tensors. The previous model of a client is
    that with which it ended the last round that it took part in; in its first, the model that it
    receives, for which the contrastive loss is log 2 and moves nothing. In the authors' code it is
    then a random initialisation of the client's own.
    """
    w, previous, history = Vector(params), {}, []
    for cohort, drawn in zip(cohorts, batches, strict=True):
        deltas, weights = [], []
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            received, last = models.tensors(w), models.tensors(previous.get(k, w))

            def loss(w_k, x, y, received=received, last=last):
                features, logits = forward(w_k, x)
                others = forward(received, x)[0], forward(last, x)[0]
                contrast = contrastive_loss(features, *others, temperature)
                return functional.cross_entropy(logits, y) + mu * contrast

            grad = models.autograd(loss)
            w_k = w
            for batch in steps:
                w_k = w_k - rate * grad(w_k, x[batch], y[batch])
            previous[k] = w_k
            deltas.append(w - w_k)
            weights.append(client_weight(weighting, len(y)))
        w = w - mean(deltas, weights)
        history.append(Round(params=w, previous=dict(previous)))
    return history


def not_true_divergence(logits, teacher, labels, temperature):
    """FedNTD's distillation loss (Lee et al. 2022), its mean over a batch.

    The divergence of the student's distribution over the classes that are not the true one from
    that of the teacher, times the square of the temperature, as in the authors' code.
    """
    others = labels[:, None] != torch.arange(logits.shape[1])

    def log_not_true(z):
        return functional.log_softmax(z[others].reshape(len(z), -1) / temperature, dim=1)

    return temperature**2 * functional.kl_div(
        log_not_true(logits), log_not_true(teacher), reduction="batchmean", log_target=True
    )


def fed_ntd(
    params,
    clients,
    forward=models.forward,
    *,
    cohorts,
    batches,
    rate,
    beta,
    temperature,
    weighting="examples",
):
    """FedNTD (Lee et al. 2022): cross-entropy and beta times the distillation loss.

    `forward(params, x)` gives features and logits, in tensors; the teacher is the model that the
    server sent.
    """
    w, history = Vector(params), []
    for cohort, drawn in zip(cohorts, batches, strict=True):
        received = models.tensors(w)

        def loss(w_k, x, y, received=received):
            logits, teacher = forward(w_k, x)[1], forward(received, x)[1]
            distance = not_true_divergence(logits, teacher, y, temperature)
            return functional.cross_entropy(logits, y) + beta * distance

        (after,) = fed_avg(
            w,
            clients,
            models.autograd(loss),
            cohorts=[cohort],
            batches=[drawn],
            rate=rate,
            weighting=weighting,
        )
        w = after.params
        history.append(after)
    return history


def fed_lc(
    params,
    clients,
    grad,
    *,
    cohorts,
    batches,
    rate,
    tau,
    num_classes,
    floor=1e-8,
    weighting="examples",
):
    """FedLC (Zhang et al. 2022, equation 8): cross-entropy of logits less tau n_c ** (-1 / 4).

    `n_c` counts the client's own examples of class c, and at least `floor`, which is FL-bench's:
    a class that the client has not drops out of its softmax. `grad` takes a fourth argument,
    what is added to the logits.
    """
    w, history = Vector(params), []
    for cohort, drawn in zip(cohorts, batches, strict=True):
        deltas, weights = [], []
        for k, steps in taking_part(clients, cohort, drawn):
            x, y = clients[k]
            counts = np.maximum(np.bincount(y, minlength=num_classes), floor)
            shift = -tau * counts ** (-1 / 4)
            w_k = w
            for batch in steps:
                w_k = w_k - rate * grad(w_k, x[batch], y[batch], shift)
            deltas.append(w - w_k)
            weights.append(client_weight(weighting, len(y)))
        w = w - mean(deltas, weights)
        history.append(Round(params=w))
    return history
