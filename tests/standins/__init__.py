"""What tests share: stand-ins for models, devices, links and runtimes, and values that are made up.

from standins.models import tiny_model
model = tiny_model("llama")  # 3 layers with random weights, the same in every test
"""

from pathlib import Path

STANDINS = Path(__file__).parent
ROOT = STANDINS.parent.parent
