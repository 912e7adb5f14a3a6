"""Importing any module here declares all of ours: losses, advantages, corrections, reductions and KL estimators."""

from skyrl.algorithms import advantages as advantages
from skyrl.algorithms import groups as groups
from skyrl.algorithms import losses as losses
from skyrl.algorithms import surrogates as surrogates
