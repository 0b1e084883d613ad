// Command probe prints what a caller sees: probe pages|errors|write|cancel|unanswered ADDRESS, or
// probe wrong|addresses ADDRESS...
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	roster "example.com/roster/clients/go"
	rosterv1 "example.com/roster/clients/go/roster/v1"
)

// newClient returns a client. An address that begins with "tls:" is called with TLS.
func newClient(address string) *roster.Client {
	transport := insecure.NewCredentials()
	address, isTLS := strings.CutPrefix(address, "tls:")
	if isTLS {
		transport = credentials.NewTLS(&tls.Config{})
	}
	client, err := roster.NewClient(address, grpc.WithTransportCredentials(transport))
	if err != nil {
		log.Fatal(err)
	}
	return client
}

const loads = 10 // that are cancelled

func endless(yield func(*rosterv1.User, error) bool) {
	for yield(&rosterv1.User{Email: "ada@example.org"}, nil) {
	}
}

func text(err error) string {
	failure := roster.ErrorFrom(fmt.Errorf("wrapped: %w", err))
	parts := []string{failure.Reason}
	switch failure.Reason {
	case "", roster.DeadlineExceeded, roster.Disconnected:
		parts = append(parts, failure.Message)
	}
	for name, value := range failure.Facts {
		parts = append(parts, name+"="+value)
	}
	for _, violation := range failure.Violations {
		parts = append(parts, violation.Field)
	}
	return strings.Join(parts, " ")
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	kind, addresses := os.Args[1], os.Args[2:]
	if kind == "addresses" {
		for _, address := range addresses {
			_, err := roster.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
			fmt.Println(err)
		}
		return
	}
	users := newClient(addresses[0]).Users
	switch kind {
	case "pages":
		request := &rosterv1.ListUsersRequest{PageSize: 2}
		for user, err := range roster.Pages(ctx, users.ListUsers, request, (*rosterv1.ListUsersResponse).GetUsers) {
			if err != nil {
				log.Fatal(err)
			}
			fmt.Println(user.Id)
		}
	case "errors":
		if made := (&roster.Error{Code: codes.NotFound}); status.Code(made) != codes.NotFound { // as in tests of callers
			log.Fatal(made)
		}
		for _, email := range []string{"user0@example.org", "nobody"} {
			_, err := users.CreateUser(ctx, &rosterv1.CreateUserRequest{User: &rosterv1.User{Email: email}})
			fmt.Println(text(err))
		}
		_, err := users.GetUser(ctx, &rosterv1.GetUserRequest{Key: &rosterv1.GetUserRequest_Id{Id: 7}})
		fmt.Println(text(err))
	case "write":
		_, err := users.CreateUser(ctx, &rosterv1.CreateUserRequest{User: &rosterv1.User{Email: "ada@example.org"}})
		fmt.Println(text(err))
	case "cancel":
		for range loads {
			ctx, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
			_, err := roster.Load(ctx, users.BulkCreateUsers, nil, endless, nil)
			fmt.Println(errors.Is(err, context.DeadlineExceeded))
			cancel()
		}
	case "unanswered":
		ctx, cancel := context.WithCancel(context.Background())
		export := func(ctx context.Context) error {
			stream, err := users.ExportUsers(ctx, &rosterv1.ExportUsersRequest{})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		}
		fmt.Println(roster.Reason(export(ctx)))
		cancel()
		err := export(ctx)
		fmt.Println(roster.Reason(err) == "" && errors.Is(err, context.Canceled))
	case "wrong":
		said := make([]chan string, len(addresses))
		for i, address := range addresses {
			said[i] = make(chan string)
			go func() {
				ada := &rosterv1.User{Email: "ada@example.org"}
				_, err := newClient(address).Users.CreateUser(ctx, &rosterv1.CreateUserRequest{User: ada})
				said[i] <- text(err)
			}()
		}
		for _, each := range said {
			fmt.Println(<-each)
		}
	}
}
