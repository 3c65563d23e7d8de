from finetune101.api import auto as auto
from finetune101.api import compare as compare
from finetune101.api import evaluate as evaluate
from finetune101.api import load as load
from finetune101.api import predict as predict
from finetune101.api import report as report
from finetune101.api import train as train
from finetune101.errors import Refused as Refused
from finetune101.recipes import RECIPES as RECIPES

__version__: str
__all__: list[str]
