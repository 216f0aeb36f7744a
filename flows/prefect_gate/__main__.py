from flows.prefect_gate.prefect_gate import main

main()
