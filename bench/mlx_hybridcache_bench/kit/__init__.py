"""What every measurement uses: the machine, pairs, tables, pictures, real text and small models."""
