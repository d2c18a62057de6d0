"""From what `--data` names to DataLoaders: sources → listing, labels → decode → cache → table → loaders."""

from cifar10.data.cache import images_at_once
from cifar10.data.decode import SIZE
from cifar10.data.listing import kinds, list_images
from cifar10.data.loaders import build_dls, describe, eval_split_name, with_stats
from cifar10.data.reading import Reading
from cifar10.data.table import ImageTable
