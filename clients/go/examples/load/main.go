// Command load creates a user for each e-mail of the standard input, one on each line. If it was interrupted, run it
// again with the same LOAD_ID and input.
//
//	load ADDRESS LOAD_ID
package main

import (
	"bufio"
	"context"
	"fmt"
	"iter"
	"log"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	roster "example.com/roster/clients/go"
	rosterv1 "example.com/roster/clients/go/roster/v1"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: load ADDRESS LOAD_ID")
	}
	client, err := roster.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	options := &rosterv1.BulkOptions{LoadId: os.Args[2]}
	summary, err := roster.Load(context.Background(), client.Users.BulkCreateUsers, options, users(), printAck)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%d created, %d failed\n", summary.Created, summary.Failed)
}

func users() iter.Seq2[*rosterv1.User, error] {
	return func(yield func(*rosterv1.User, error) bool) {
		lines := bufio.NewScanner(os.Stdin)
		for lines.Scan() {
			if !yield(&rosterv1.User{Email: lines.Text()}, nil) {
				return
			}
		}
		if err := lines.Err(); err != nil {
			yield(nil, err)
		}
	}
}

func printAck(ack *rosterv1.BulkAck) error {
	for _, failure := range ack.Failures {
		fmt.Printf("row %d: %s %s\n", failure.Offset, failure.Reason, failure.Field)
	}
	fmt.Printf("%d rows are settled\n", ack.NextOffset)
	return nil
}
