"""python -m experiments.fit_operators: see experiments.gpu_kit.fit_operators."""

from experiments.gpu_kit.fit_operators import main

if __name__ == "__main__":
    main()
