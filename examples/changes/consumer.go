// Command consumer follows the change feed with a cache, a search index or a mirror of the users.
//
//	consumer cache|index|mirror ADDRESS FILE
//
// It reads ids, or words for the index, one on each line, and prints what it has for each. Kill it at any
// time and run it again: the index and the mirror continue where they were.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"

	"go.etcd.io/bbolt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	roster "example.com/roster/clients/go"
	rosterv1 "example.com/roster/clients/go/roster/v1"
)

const fresh = 30 * time.Second

// A sink is what the changes are for.
type sink interface {
	begin(ctx context.Context) (token string, err error)
	apply(response *rosterv1.WatchChangesResponse) error
	clear() error
	ask(question string) (string, error)
}

// A rows is what a store does with a user; nil is one that does not exist.
type rows interface {
	put(tx *bbolt.Tx, id int64, user *rosterv1.User) error
	ask(tx *bbolt.Tx, question string) string
}

// A store is a copy of the users in a file. No transaction stores rows without the token that belongs to them.
type store struct {
	db    *bbolt.DB
	users rosterv1.UserServiceClient
	rows  rows
}

var feedBucket, usersBucket, wordsBucket, tokenKey = []byte("feed"), []byte("users"), []byte("words"), []byte("token")

// begin returns the stored token; without one, it copies all users first.
func (s *store) begin(ctx context.Context) (string, error) {
	var token string
	s.db.View(func(tx *bbolt.Tx) error {
		if bucket := tx.Bucket(feedBucket); bucket != nil {
			token = string(bucket.Get(tokenKey))
		}
		return nil
	})
	if token != "" {
		return token, nil
	}
	return token, s.db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{feedBucket, usersBucket, wordsBucket} {
			if err := tx.DeleteBucket(name); err != nil && !errors.Is(err, bbolt.ErrBucketNotFound) {
				return err
			}
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		call, err := s.users.ExportUsers(ctx, &rosterv1.ExportUsersRequest{})
		for err == nil {
			var response *rosterv1.ExportUsersResponse
			if response, err = call.Recv(); err != nil {
				break
			}
			if token == "" {
				token = response.WatchToken // of the first message
			}
			for _, user := range response.Users {
				if err = s.rows.put(tx, user.Id, user); err != nil {
					return err
				}
			}
		}
		if err != io.EOF {
			return err
		}
		if token == "" { // it would mean now, and changes since the export would be missing
			return errors.New("the server has no change feed: its exports have no watch_token")
		}
		return tx.Bucket(feedBucket).Put(tokenKey, []byte(token))
	})
}

// apply applies changes in the order received, and stores the token, in one transaction.
func (s *store) apply(response *rosterv1.WatchChangesResponse) error {
	return s.db.Update(func(tx *bbolt.Tx) error {
		for _, change := range response.Changes {
			if err := s.rows.put(tx, changedID(change), change.GetUser()); err != nil {
				return err
			}
		}
		return tx.Bucket(feedBucket).Put(tokenKey, []byte(response.Token))
	})
}

// clear forgets the token: the next beginning is an export. Until then, the old rows stay.
func (s *store) clear() error {
	return s.db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(feedBucket).Delete(tokenKey) })
}

func (s *store) ask(question string) (answer string, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		if tx.Bucket(usersBucket) != nil {
			answer = s.rows.ask(tx, question)
		}
		return nil
	})
	return answer, err
}

// A mirror has all users. The id is the only key, because two users can trade their e-mails.
type mirror struct{}

func (mirror) put(tx *bbolt.Tx, id int64, user *rosterv1.User) error {
	if user == nil {
		return tx.Bucket(usersBucket).Delete(key(id))
	}
	value, err := proto.Marshal(user)
	if err != nil {
		return err
	}
	return tx.Bucket(usersBucket).Put(key(id), value)
}

func (mirror) ask(tx *bbolt.Tx, question string) string {
	id, _ := strconv.ParseInt(question, 10, 64)
	value, user := tx.Bucket(usersBucket).Get(key(id)), &rosterv1.User{}
	if value == nil || proto.Unmarshal(value, user) != nil {
		return "-"
	}
	return user.GetFullName()
}

// An index has the ids of users by the words of their names. It keeps the names, to find the words to delete.
type index struct{}

func (index) put(tx *bbolt.Tx, id int64, user *rosterv1.User) error {
	names, words := tx.Bucket(usersBucket), tx.Bucket(wordsBucket)
	for _, word := range split(string(names.Get(key(id)))) {
		if err := words.Delete(append([]byte(word+"\x00"), key(id)...)); err != nil {
			return err
		}
	}
	if user == nil {
		return names.Delete(key(id))
	}
	for _, word := range split(user.GetFullName()) {
		if err := words.Put(append([]byte(word+"\x00"), key(id)...), nil); err != nil {
			return err
		}
	}
	return names.Put(key(id), []byte(user.GetFullName()))
}

func (index) ask(tx *bbolt.Tx, question string) string {
	var ids []string
	prefix := []byte(strings.ToLower(question) + "\x00")
	cursor := tx.Bucket(wordsBucket).Cursor()
	for found, _ := cursor.Seek(prefix); bytes.HasPrefix(found, prefix); found, _ = cursor.Next() {
		ids = append(ids, fmt.Sprint(binary.BigEndian.Uint64(found[len(prefix):])))
	}
	if ids == nil {
		return "-"
	}
	return strings.Join(ids, " ")
}

func split(name string) []string {
	return strings.FieldsFunc(strings.ToLower(name), func(r rune) bool { return !unicode.IsLetter(r) && !unicode.IsDigit(r) })
}

func key(id int64) []byte {
	return binary.BigEndian.AppendUint64(nil, uint64(id))
}

// A cache has users that were read before, in memory. A change drops its user; the next question reads it again.
type cache struct {
	users   rosterv1.UserServiceClient
	mutex   sync.Mutex
	token   string
	heardAt time.Time
	names   map[int64]string
	reads   map[int64]*int
}

// begin returns the last token, "" to begin now: a cache that is empty has missed nothing.
func (c *cache) begin(context.Context) (string, error) {
	return c.token, nil
}

func (c *cache) apply(response *rosterv1.WatchChangesResponse) error {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	for _, change := range response.Changes {
		delete(c.names, changedID(change))
		delete(c.reads, changedID(change)) // its result may be older than this change
	}
	c.token, c.heardAt = response.Token, time.Now()
	return nil
}

func (c *cache) clear() error {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.token, c.heardAt, c.names, c.reads = "", time.Time{}, map[int64]string{}, map[int64]*int{}
	return nil
}

func (c *cache) ask(question string) (string, error) {
	id, err := strconv.ParseInt(question, 10, 64)
	if err != nil {
		return "", err
	}
	read := new(int)
	if name, ok := c.lookUp(id, read); ok {
		return "hit " + name, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	user, err := c.users.GetUser(ctx, &rosterv1.GetUserRequest{Key: &rosterv1.GetUserRequest_Id{Id: id}})
	name := user.GetFullName()
	if roster.Reason(err) == "USER_NOT_FOUND" {
		name, err = "-", nil
	}
	if err != nil {
		return "", err
	}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if c.reads[id] == read { // no change has arrived since the read began
		c.names[id] = name
		delete(c.reads, id)
	}
	return "miss " + name, nil
}

// lookUp returns a name, or notes the read that will find it. Without responses, the cache does not know what has
// changed; before the first one, changes are not reported.
func (c *cache) lookUp(id int64, read *int) (string, bool) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if time.Since(c.heardAt) > fresh {
		return "", false
	}
	name, ok := c.names[id]
	if !ok {
		c.reads[id] = read
	}
	return name, ok
}

// changedID returns the id of a user that has changed or was deleted.
func changedID(change *rosterv1.Change) int64 {
	if user := change.GetUser(); user != nil {
		return user.Id
	}
	return change.GetDeletedUserId()
}

// watch applies responses until an error that the client can't fix.
func watch(client *roster.Client, into sink) error {
	ctx := context.Background()
	token, err := into.begin(ctx)
	if err != nil {
		return err
	}
	for response, err := range roster.Watch(ctx, client.Changes, token, rosterv1.Change_USERS) {
		if err != nil {
			return err
		}
		if err := into.apply(response); err != nil {
			return err
		}
	}
	return nil
}

// follow applies changes for ever, and returns the first error that a retry can't fix.
func follow(client *roster.Client, into sink) error {
	for {
		err := watch(client, into)
		switch reason := roster.Reason(err); {
		case reason == "FEED_RESET" || reason == "TOKEN_EXPIRED":
			if err := into.clear(); err != nil {
				return err
			}
		case roster.ErrorFrom(err).IsRetryable():
			log.Printf("%v; trying again", err)
			time.Sleep(time.Second)
		default:
			return err
		}
	}
}

func main() {
	kind, address, file := os.Args[1], os.Args[2], os.Args[3]
	client, err := roster.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	var into sink
	if kind == "cache" {
		into = &cache{users: client.Users}
		into.clear()
	} else {
		db, err := bbolt.Open(file, 0o600, nil)
		if err != nil {
			log.Fatal(err)
		}
		into = &store{db, client.Users, map[string]rows{"index": index{}, "mirror": mirror{}}[kind]}
	}
	go func() { log.Fatal(follow(client, into)) }()
	questions := bufio.NewScanner(os.Stdin)
	for questions.Scan() {
		answer, err := into.ask(questions.Text())
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(answer)
	}
}
