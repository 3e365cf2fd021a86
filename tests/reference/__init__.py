"""Federated algorithms in plain NumPy and PyTorch, from the pseudo-code of their papers.

They are slow and say what they do, for the package to be compared with. In all of them

- `params` is a flat dict of arrays, and everything is in float64;
- `clients` is a list of what each client has, `(x, y)` unless said otherwise, of any sizes. A
  client without examples takes no part, but is one of the N clients of the population;
- `cohorts[r]` lists the clients of round r, and `batches[r][j]` the batches of `cohorts[r][j]`, one
  for each local step: indices of rows of its `x` and `y`;
- `grad(params, x, y)` is the gradient of the mean loss of a batch, a `Vector`, and
  `loss(params, x, y)` the mean loss;
- `weighting` is "examples" or "uniform": what a client weighs in the mean over the cohort;
- what is returned is a list with one entry for each round, what holds after it.
"""
