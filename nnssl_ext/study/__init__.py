"""Run ordinary trainings as a study and report them."""
