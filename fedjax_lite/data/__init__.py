"""Data sets, populations and their sources."""

from fedjax_lite.data.dataset import FederatedDataset as FederatedDataset
from fedjax_lite.data.digits import digits as digits
from fedjax_lite.data.population import GeneratedPopulation as GeneratedPopulation
from fedjax_lite.data.population import Population as Population
from fedjax_lite.data.population import ResidentPopulation as ResidentPopulation
from fedjax_lite.data.synthetic import gaussian_images as gaussian_images
from fedjax_lite.data.synthetic import halfspace as halfspace
from fedjax_lite.data.synthetic import halfspace_batch as halfspace_batch
from fedjax_lite.data.synthetic import synthetic as synthetic
