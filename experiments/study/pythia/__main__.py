"""``python -m experiments.study.pythia --shape 70m --folder DIR --json FILE``."""

from experiments.application import run_application
from experiments.study.pythia.study import pythia

if __name__ == "__main__":
    run_application(pythia)
