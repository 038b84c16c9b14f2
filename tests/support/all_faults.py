"""All injected faults, by module and name."""

import faults_of_layers
import faults_of_numbers
import faults_of_rounding
import faults_of_state
import independent_faults
import more_independent_faults

INDEPENDENT = [independent_faults, more_independent_faults]
MODULES = [faults_of_layers, faults_of_numbers, faults_of_rounding, faults_of_state, *INDEPENDENT]
FAULTS = {
    f"{module.__name__}-{name}": fault
    for module in MODULES
    for name, fault in module.faults.items()
}
